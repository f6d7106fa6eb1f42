// What every device checks of the arguments of cluster_sum and cluster_broadcast before a kernel
// runs; see ops/cluster_sum.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace moe_comp {

inline void check_indices(const char* name, const at::Tensor& indices, const at::Tensor& rows) {
  TORCH_CHECK_VALUE(indices.dim() == 1 && indices.is_contiguous() &&
                        indices.scalar_type() == at::kLong && indices.device() == rows.device(),
                    name, " must be contiguous int64 of one dimension on ", rows.device(), ", not ",
                    indices.scalar_type(), " ", indices.sizes(), " on ", indices.device());
}

// Throws a ValueError that names the value and the requirement unless all tensors have the right
// form. `rows` are called `name`.
inline void check_clusters(const char* name, const at::Tensor& rows, const at::Tensor& order,
                           const at::Tensor& offsets) {
  const at::ScalarType type = rows.scalar_type();
  const bool has_kernel =
      type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble;
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.is_contiguous() && has_kernel, name,
                    " must be contiguous float32, bfloat16, float16 or float64 of two dimensions, ",
                    "not ", type, " ", rows.sizes(), " with strides ", rows.strides());
  check_indices("order", order, rows);
  check_indices("offsets", offsets, rows);
  TORCH_CHECK_VALUE(offsets.size(0) > 0, "offsets must be one more than clusters, not none");
}

inline void check_cluster_sum(const at::Tensor& rows, const at::Tensor& order,
                              const at::Tensor& offsets) {
  check_clusters("rows", rows, order, offsets);
  TORCH_CHECK_VALUE(order.size(0) == rows.size(0), "order must have one entry for each of the ",
                    rows.size(0), " rows, not ", order.size(0));
}

inline void check_cluster_broadcast(const at::Tensor& values, const at::Tensor& order,
                                    const at::Tensor& offsets) {
  check_clusters("values", values, order, offsets);
  TORCH_CHECK_VALUE(offsets.size(0) == values.size(0) + 1, "offsets must be one more than the ",
                    values.size(0), " values, not ", offsets.size(0));
}

}  // namespace moe_comp
