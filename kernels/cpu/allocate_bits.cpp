// The CPU kernel of allocate_bits; megatron_moe_comp/ops/allocate_bits.py says what it computes.
#include "allocate_bits.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>

namespace moe_comp {
namespace {

constexpr int64_t kNarrowest = 2;
constexpr int64_t kWidest = 8;
constexpr int64_t kExchangeRanks = 16;

Totals loads_of(const int64_t* rows, int64_t ranks) {
  Totals loads{std::vector<int64_t>(ranks), std::vector<int64_t>(ranks)};
  for (int64_t s = 0; s < ranks; ++s, rows += ranks) {
    for (int64_t d = 0; d < ranks; ++d) {
      loads.senders[s] += rows[d];
      loads.receivers[d] += rows[d];
    }
    loads.all += loads.senders[s];
  }
  return loads;
}

// Gives every link what both its nodes could afford on all of their links, `most` bits at most.
void fill(Allocation& a, const Totals& loads, int64_t target_bits, int64_t most) {
  const int64_t P = a.ranks;
  const int64_t budget = target_bits * loads.all / P;
  const auto affordable = [&](int64_t load) {
    return load == 0 ? most : std::max(a.min_bits, std::min(most, budget / load));
  };
  std::vector<int64_t> limits(P);
  for (int64_t d = 0; d < P; ++d) limits[d] = affordable(loads.receivers[d]);
  a.left = {std::vector<int64_t>(P, budget), std::vector<int64_t>(P, budget),
            target_bits * loads.all};
  for (int64_t s = 0; s < P; ++s) {
    const int64_t* rows = a.rows + s * P;
    uint8_t* bits = a.bits + s * P;
    const int64_t limit = affordable(loads.senders[s]);
    int64_t sent = 0;
    for (int64_t d = 0; d < P; ++d) {
      const int64_t b = std::min(limit, limits[d]);
      bits[d] = static_cast<uint8_t>(rows[d] == 0 ? a.max_bits : b);
      a.left.receivers[d] -= rows[d] * b;
      sent += rows[d] * b;
    }
    a.left.senders[s] -= sent;
    a.left.all -= sent;
  }
}

at::Tensor allocate_bits(const at::Tensor& num_rows, int64_t target_bits, int64_t min_bits,
                         int64_t max_bits) {
  TORCH_CHECK_VALUE(num_rows.scalar_type() == at::kLong && num_rows.dim() == 2 &&
                        num_rows.size(0) == num_rows.size(1),
                    "num_rows must be int64 [P, P]");
  TORCH_CHECK_VALUE(kNarrowest <= min_bits && min_bits <= max_bits && max_bits <= kWidest,
                    "min_bits and max_bits must satisfy 2 <= min_bits <= max_bits <= 8, not ",
                    min_bits, " and ", max_bits);
  const int64_t P = num_rows.size(0);
  const at::Tensor rows = num_rows.clone(at::MemoryFormat::Contiguous);
  rows.diagonal().zero_();
  at::Tensor bits = at::empty({P, P}, rows.options().dtype(at::kByte));
  if (P == 0) return bits.to(at::kLong);
  Allocation a{P, min_bits, max_bits, rows.const_data_ptr<int64_t>(), bits.data_ptr<uint8_t>(), {}};
  const Totals loads = loads_of(a.rows, P);
  // Two nodes over their budgets, one sending and one receiving, can leave the others more than the
  // target on average.
  for (int64_t most = max_bits; most >= min_bits; --most) {
    fill(a, loads, target_bits, most);
    if (a.left.all >= 0) break;
  }
  raise_levels(a);
  if (P <= kExchangeRanks) exchange_bits(a);
  return bits.to(at::kLong);
}

}  // namespace
}  // namespace moe_comp

TORCH_LIBRARY_IMPL(megatron_moe_comp, CPU, m) { m.impl("allocate_bits", &moe_comp::allocate_bits); }
