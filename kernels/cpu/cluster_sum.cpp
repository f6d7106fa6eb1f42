// The CPU kernels of cluster_sum and cluster_broadcast; megatron_moe_comp/ops/cluster_sum.py says
// what they compute.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../cluster_checks.h"
#include "isa.h"
#include "row_types.h"

namespace moe_comp {
namespace {

constexpr int64_t kGrainValues = 32768;  // that are worth another thread
constexpr int64_t kPartColumns = 512;    // whose sums stay in the nearest cache
constexpr int64_t kLineBytes = 64;

struct Clusters {
  const int64_t* order;    // [num_rows]
  const int64_t* offsets;  // [num_clusters + 1]
  int64_t num_rows;
  int64_t num_clusters;
  int64_t hidden;
  bool mean;

  int64_t size(int64_t cluster) const { return offsets[cluster + 1] - offsets[cluster]; }
  int64_t grain() const {
    return std::max<int64_t>(1, kGrainValues / std::max<int64_t>(1, hidden));
  }
};

inline float to_wide(float x) { return x; }
inline float to_wide(Bf16 x) { return to_float(x); }
inline double to_wide(double x) { return x; }

inline void round_to(float x, float& result) { result = x; }
inline void round_to(float x, Bf16& result) { result = from_float<Bf16>(x); }
inline void round_to(double x, double& result) { result = x; }

template <typename T>
using Wide = decltype(to_wide(T()));

// Sums up to kPartColumns columns of a cluster's rows; `rows` and `sums` begin at the first one.
template <typename T>
[[gnu::always_inline]] inline void sum_part(const T* rows, const Clusters& clusters,
                                            int64_t cluster, int64_t width, T* sums) {
  Wide<T> wide[kPartColumns];
  std::fill_n(wide, width, Wide<T>(0));
  for (int64_t i = clusters.offsets[cluster]; i < clusters.offsets[cluster + 1]; ++i) {
    const T* const row = rows + clusters.order[i] * clusters.hidden;
    if (i + 1 < clusters.num_rows) {
      const T* const next = rows + clusters.order[i + 1] * clusters.hidden;
      for (int64_t j = 0; j < width; j += kLineBytes / sizeof(T)) __builtin_prefetch(next + j);
    }
    for (int64_t j = 0; j < width; ++j) wide[j] += to_wide(row[j]);
  }
  if (clusters.mean && clusters.size(cluster) > 1) {
    const Wide<T> count = static_cast<Wide<T>>(clusters.size(cluster));
    for (int64_t j = 0; j < width; ++j) wide[j] /= count;
  }
  for (int64_t j = 0; j < width; ++j) round_to(wide[j], sums[j]);
}

template <typename T>
using SumPart = void (*)(const T* rows, const Clusters& clusters, int64_t cluster, int64_t width,
                         T* sums);

template <typename T>
void sum_part_generic(const T* rows, const Clusters& clusters, int64_t cluster, int64_t width,
                      T* sums) {
  sum_part(rows, clusters, cluster, width, sums);
}

#if MMC_X86
template <typename T>
[[gnu::target("avx2")]] void sum_part_avx2(const T* rows, const Clusters& clusters, int64_t cluster,
                                           int64_t width, T* sums) {
  sum_part(rows, clusters, cluster, width, sums);
}
#endif

// AVX-512 was measured not to be faster than AVX2.
template <typename T>
SumPart<T> sum_part_of(Isa isa) {
#if MMC_X86
  if (isa != Isa::kGeneric) return sum_part_avx2<T>;
#endif
  return sum_part_generic<T>;
}

template <typename T>
void sum_rows(const void* rows, const Clusters& clusters, void* results) {
  const int64_t hidden = clusters.hidden;
  const SumPart<T> sum_part = sum_part_of<T>(selected_isa());
  const int64_t* const ends = clusters.offsets + clusters.num_clusters;
  // A thread has the clusters that begin among its rows; those behind the last row are empty.
  at::parallel_for(0, clusters.num_rows + 1, clusters.grain(), [&](int64_t begin, int64_t end) {
    const int64_t* offset = std::lower_bound(clusters.offsets, ends, begin);
    for (; offset < ends && *offset < end; ++offset) {
      const int64_t cluster = offset - clusters.offsets;
      for (int64_t column = 0; column < hidden; column += kPartColumns) {
        sum_part(static_cast<const T*>(rows) + column, clusters, cluster,
                 std::min(kPartColumns, hidden - column),
                 static_cast<T*>(results) + cluster * hidden + column);
      }
    }
  });
}

template <typename T>
void broadcast_values(const void* values, const Clusters& clusters, void* results) {
  const int64_t hidden = clusters.hidden;
  at::parallel_for(0, clusters.num_rows, clusters.grain(), [&](int64_t begin, int64_t end) {
    std::vector<T> quotients(clusters.mean ? hidden : 0);
    const int64_t* const after =
        std::upper_bound(clusters.offsets, clusters.offsets + clusters.num_clusters + 1, begin);
    for (int64_t i = begin, cluster = after - clusters.offsets - 1; i < end; ++cluster) {
      const int64_t last = std::min(end, clusters.offsets[cluster + 1]);
      if (i == last) continue;
      const T* value = static_cast<const T*>(values) + cluster * hidden;
      if (clusters.mean && clusters.size(cluster) > 1) {
        const Wide<T> count = static_cast<Wide<T>>(clusters.size(cluster));
        for (int64_t j = 0; j < hidden; ++j) round_to(to_wide(value[j]) / count, quotients[j]);
        value = quotients.data();
      }
      for (; i < last; ++i) {
        std::memcpy(static_cast<T*>(results) + clusters.order[i] * hidden, value,
                    hidden * sizeof(T));
      }
    }
  });
}

// Throws a ValueError unless every row is in one cluster and no index is out of bounds.
void check_contents(const Clusters& clusters) {
  const int64_t* const offsets = clusters.offsets;
  const int64_t* const end = offsets + clusters.num_clusters + 1;
  TORCH_CHECK_VALUE(offsets[0] == 0 && end[-1] == clusters.num_rows && std::is_sorted(offsets, end),
                    "offsets must be from 0 to ", clusters.num_rows, " and not fall");
  std::vector<char> seen(clusters.num_rows);
  for (int64_t i = 0; i < clusters.num_rows; ++i) {
    const int64_t row = clusters.order[i];
    TORCH_CHECK_VALUE(0 <= row && row < clusters.num_rows && !seen[row],
                      "order must be a permutation of 0 to ", clusters.num_rows - 1, ", not have ",
                      row, " at ", i);
    seen[row] = 1;
  }
}

using Kernel = void (*)(const void* rows, const Clusters& clusters, void* results);

// `kernels` are those of float32, bfloat16 and float64; float16 is converted to and from float32.
at::Tensor call(const at::Tensor& rows, const at::Tensor& order, const at::Tensor& offsets,
                bool mean, int64_t num_results, const Kernel (&kernels)[3]) {
  const at::ScalarType type = rows.scalar_type();
  if (type == at::kHalf) {
    return call(rows.to(at::kFloat), order, offsets, mean, num_results, kernels).to(at::kHalf);
  }
  const Clusters clusters = {order.const_data_ptr<int64_t>(),
                             offsets.const_data_ptr<int64_t>(),
                             order.size(0),
                             offsets.size(0) - 1,
                             rows.size(1),
                             mean};
  check_contents(clusters);
  const at::Tensor results = at::empty({num_results, rows.size(1)}, rows.options());
  const Kernel kernel = kernels[type == at::kFloat ? 0 : type == at::kBFloat16 ? 1 : 2];
  kernel(rows.const_data_ptr(), clusters, results.mutable_data_ptr());
  return results;
}

at::Tensor cluster_sum(const at::Tensor& rows, const at::Tensor& order, const at::Tensor& offsets,
                       bool mean) {
  check_cluster_sum(rows, order, offsets);
  return call(rows, order, offsets, mean, offsets.size(0) - 1,
              {sum_rows<float>, sum_rows<Bf16>, sum_rows<double>});
}

at::Tensor cluster_broadcast(const at::Tensor& values, const at::Tensor& order,
                             const at::Tensor& offsets, bool mean) {
  check_cluster_broadcast(values, order, offsets);
  return call(values, order, offsets, mean, order.size(0),
              {broadcast_values<float>, broadcast_values<Bf16>, broadcast_values<double>});
}

}  // namespace
}  // namespace moe_comp

TORCH_LIBRARY_IMPL(megatron_moe_comp, CPU, library) {
  library.impl("cluster_sum", moe_comp::cluster_sum);
  library.impl("cluster_broadcast", moe_comp::cluster_broadcast);
}
