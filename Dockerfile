# An image to train in. VARIANT is gpu, or cpu for tests and laptops; see docs/containers.md.
#   docker build -t megatron-moe-comp .
#   docker build -t megatron-moe-comp:cpu --build-arg VARIANT=cpu .
ARG VARIANT=gpu
# PyTorch 2.12.0a0, CUDA 13.2, Python 3.12. That of 26.03 is 2.11.0a0, which counts as older than 2.11.
ARG GPU_BASE=nvcr.io/nvidia/pytorch:26.04-py3@sha256:192d749b4d773610ec9e01c0443a9df545d196c412b7b8fd33bfa3da362a49e7
ARG CPU_BASE=python:3.12.12-slim-bookworm

FROM ${GPU_BASE} AS gpu
# Ubuntu has the part of Python that makes virtual environments in a package of its own. It has to be
# that of the Python which is there, whose version is the base image's to say.
# hadolint ignore=DL3008
RUN python3 -c 'import ensurepip' || { apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*; }
RUN useradd --create-home --shell /bin/bash --uid 10001 moe \
    && mkdir -p /opt/megatron_moe_comp /workspace \
    && chown moe:moe /opt/megatron_moe_comp /workspace
COPY --chown=moe:moe . /opt/megatron_moe_comp
USER 10001
WORKDIR /opt/megatron_moe_comp
# The base sets TORCH_CUDA_ARCH_LIST, which an ARG of that name would not override.
ARG CUDA_ARCHITECTURES="8.0;9.0+PTX"
ENV TORCH_CUDA_ARCH_LIST=${CUDA_ARCHITECTURES} SYSTEM_PACKAGES=1
RUN export PIP_NO_CACHE_DIR=1 \
    && python3 scripts/base_packages.py > base_packages.txt \
    && bash scripts/setup.sh \
    && PIP_CONSTRAINT="$PWD/.venv/constraints.txt" bash docker/te_apex.sh .venv/bin/python \
    && ln -s ../../docker/torchrun .venv/bin/torchrun \
    && bash docker/check_gpu.sh .venv/bin/python base_packages.txt

FROM ${CPU_BASE} AS cpu
# Debian keeps only the newest version of a package: a pinned one would soon not be found.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --shell /bin/bash --uid 10001 moe \
    && mkdir -p /opt/megatron_moe_comp /workspace \
    && chown moe:moe /opt/megatron_moe_comp /workspace
COPY --chown=moe:moe . /opt/megatron_moe_comp
USER 10001
WORKDIR /opt/megatron_moe_comp
RUN PIP_NO_CACHE_DIR=1 bash scripts/setup.sh \
    && .venv/bin/python -m megatron_moe_comp.ops --require cpu

FROM ${VARIANT}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="megatron-moe-comp" \
    org.opencontainers.image.description="Mixture-of-Experts training on Megatron with a compressed expert all-to-all" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.licenses="Apache-2.0"
ENV PATH=/opt/megatron_moe_comp/.venv/bin:${PATH}
WORKDIR /workspace
# -P: what is mounted here may be a checkout, without compiled kernels.
HEALTHCHECK --interval=5m --timeout=2m --start-period=1m \
    CMD ["python", "-P", "-m", "megatron_moe_comp.ops", "--require", "cpu"]
CMD ["bash"]
