// The steps of allocate_bits, apart from torch.
#pragma once

#include <cstdint>
#include <vector>

namespace moe_comp {

// Rows, or rows times bits, of every sender, of every receiver, and of all together.
struct Totals {
  std::vector<int64_t> senders;
  std::vector<int64_t> receivers;
  int64_t all = 0;
};

struct Allocation {
  int64_t ranks;
  int64_t min_bits;
  int64_t max_bits;
  const int64_t* rows;  // [ranks, ranks], no rows on the diagonal
  uint8_t* bits;        // [ranks, ranks], max_bits where there are no rows
  Totals left;          // what is left of the budgets
};

// Raises the links of one level after the other, as far as the budgets go.
void raise_levels(Allocation& a);

// Improves an allocation by exchanging bits between links.
void exchange_bits(Allocation& a);

}  // namespace moe_comp
