// The CUDA kernels as torch ops. megatron_moe_comp/ops/ has their schemas; importing the module
// registers them.
#include <Python.h>

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../quantize_math.cuh"
#include "launchers.h"

namespace moe_comp {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

void check_tensors(const at::Tensor& rows, const OptionalTensor& row_scales,
                   const at::Tensor& message) {
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.is_contiguous() && rows.is_floating_point(),
                    "rows must be contiguous [N, H] of a floating-point dtype, not ",
                    rows.scalar_type(), " ", rows.sizes(), " with strides ", rows.strides());
  TORCH_CHECK_VALUE(rows.is_cuda(), "rows must be on a CUDA device, not on ", rows.device());
  TORCH_CHECK_VALUE(rows.size(1) <= kMaxHidden, "rows must have at most ", kMaxHidden,
                    " columns, not ", rows.size(1));
  TORCH_CHECK_VALUE(
      message.dim() == 1 && message.is_contiguous() && message.scalar_type() == at::kByte,
      "message must be contiguous uint8 [bytes], not ", message.scalar_type(), " ", message.sizes(),
      " with strides ", message.strides());
  TORCH_CHECK_VALUE(message.device() == rows.device(), "message must be on ", rows.device(),
                    " like rows, not on ", message.device());
  if (!row_scales) return;
  TORCH_CHECK_VALUE(row_scales->dim() == 1 && row_scales->size(0) == rows.size(0) &&
                        row_scales->is_contiguous() && row_scales->scalar_type() == at::kFloat &&
                        row_scales->device() == rows.device(),
                    "row_scales must be contiguous float32 [", rows.size(0), "] on ", rows.device(),
                    ", not ", row_scales->scalar_type(), " ", row_scales->sizes(), " on ",
                    row_scales->device());
}

void check_range(int64_t segment, const char* what, int64_t begin, int64_t size, int64_t limit) {
  TORCH_CHECK_VALUE(0 <= begin && 0 <= size && size <= limit && begin <= limit - size, "segment ",
                    segment, ": its ", size, " ", what, " from ", begin, " must lie in the ",
                    limit);
}

void check_segments(at::IntArrayRef table, const at::Tensor& rows, int64_t message_bytes,
                    bool scales_in_message) {
  TORCH_CHECK_VALUE(table.size() % kSegmentFields == 0, "segments must hold ", kSegmentFields,
                    " integers per segment, not ", table.size(), " in all");
  for (size_t i = 0; i < table.size(); i += kSegmentFields) {
    const int64_t number = static_cast<int64_t>(i) / kSegmentFields;
    const int64_t first_row = table[i], num_rows = table[i + 1], num_bits = table[i + 2];
    TORCH_CHECK_VALUE(kMinBits <= num_bits && num_bits <= kMaxBits, "segment ", number,
                      ": num_bits must be ", kMinBits, " to ", kMaxBits, ", not ", num_bits);
    check_range(number, "rows", first_row, num_rows, rows.size(0));
    if (num_rows == 0) continue;
    const int64_t row_bytes = packed_bytes(rows.size(1), static_cast<int>(num_bits));
    check_range(number, "bytes of codes", table[i + 3], num_rows * row_bytes, message_bytes);
    if (scales_in_message) {
      check_range(number, "bytes of scales", table[i + 4], 4 * num_rows, message_bytes);
    }
  }
}

RowType row_type_of(const at::Tensor& rows) {
  switch (rows.scalar_type()) {
    case at::kBFloat16:
      return RowType::kBfloat16;
    case at::kHalf:
      return RowType::kFloat16;
    default:
      return RowType::kFloat32;
  }
}

// Rows of other types are converted to and from float32.
bool has_kernel(const at::Tensor& rows) {
  return rows.scalar_type() == at::kFloat || row_type_of(rows) != RowType::kFloat32;
}

// Returns the arguments of a launcher; `rows` are of a type that has a kernel.
OpCall call_of(const at::Tensor& rows, const OptionalTensor& row_scales, const at::Tensor& message,
               at::IntArrayRef table) {
  OpCall call = {};
  call.rows = rows.data_ptr();
  call.hidden = rows.size(1);
  call.row_scales = row_scales ? row_scales->const_data_ptr<float>() : nullptr;
  call.message = static_cast<uint8_t*>(message.data_ptr());
  call.segments = table.data();
  call.num_segments = static_cast<int64_t>(table.size()) / kSegmentFields;
  call.row_type = row_type_of(rows);
  return call;
}

uint32_t checked_word(const char* name, int64_t value) {
  TORCH_CHECK_VALUE(0 <= value && value <= UINT32_MAX, name, " must be 0 to 2^32 - 1, not ", value);
  return static_cast<uint32_t>(value);
}

void quantize_pack(const at::Tensor& rows, const OptionalTensor& row_scales,
                   const at::Tensor& message, at::IntArrayRef table, int64_t key, int64_t offset,
                   int64_t stream) {
  check_tensors(rows, row_scales, message);
  check_segments(table, rows, message.numel(), !row_scales.has_value());
  const RandomStream random = {static_cast<uint64_t>(key), checked_word("offset", offset),
                               checked_word("stream", stream)};
  const c10::cuda::CUDAGuard guard(rows.device());
  const at::Tensor source = has_kernel(rows) ? rows : rows.to(at::kFloat);
  const OpCall call = call_of(source, row_scales, message, table);
  C10_CUDA_CHECK(moe_comp_quantize_pack(&call, &random, c10::cuda::getCurrentCUDAStream()));
}

void unpack_dequantize(const at::Tensor& message, const OptionalTensor& row_scales,
                       const at::Tensor& rows, at::IntArrayRef table) {
  check_tensors(rows, row_scales, message);
  check_segments(table, rows, message.numel(), !row_scales.has_value());
  const c10::cuda::CUDAGuard guard(rows.device());
  const bool direct = has_kernel(rows);
  const at::Tensor target =
      direct ? rows : rows.new_empty(rows.sizes(), rows.options().dtype(at::kFloat));
  const OpCall call = call_of(target, row_scales, message, table);
  C10_CUDA_CHECK(moe_comp_unpack_dequantize(&call, c10::cuda::getCurrentCUDAStream()));
  if (direct) return;
  for (size_t i = 0; i < table.size(); i += kSegmentFields) {
    rows.narrow(0, table[i], table[i + 1]).copy_(target.narrow(0, table[i], table[i + 1]));
  }
}

}  // namespace
}  // namespace moe_comp

TORCH_LIBRARY_IMPL(megatron_moe_comp, CUDA, library) {
  library.impl("quantize_pack", moe_comp::quantize_pack);
  library.impl("unpack_dequantize", moe_comp::unpack_dequantize);
}

PyMODINIT_FUNC PyInit__kernels_cuda() {
  static PyModuleDef module = {.m_base = PyModuleDef_HEAD_INIT, .m_name = "_kernels_cuda"};
  return PyModule_Create(&module);
}
