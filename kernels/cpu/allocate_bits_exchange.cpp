// The last part of allocate_bits: exchanges of bits between links that lower the variance.
#include <algorithm>
#include <array>
#include <utility>

#include "allocate_bits.h"

namespace moe_comp {
namespace {

constexpr int kNarrowest = 2;
constexpr int kWidest = 8;
constexpr int kVarianceBits = 20;

// The variance of a value of so many bits, in fixed point.
constexpr std::array<int64_t, kWidest + 1> kVariances = [] {
  std::array<int64_t, kWidest + 1> variances{};
  for (int b = kNarrowest; b <= kWidest; ++b) {
    const int64_t levels = (int64_t{1} << (b - 1)) - 1;
    variances[b] = (int64_t{1} << kVarianceBits) / (levels * levels);
  }
  return variances;
}();

// A link is its index in the matrix.
class Exchange {
 public:
  explicit Exchange(Allocation& a) : a_(a) {}

  // Gives a link one more bit, takes bits from others where that overdraws a budget, and spends
  // what is left over; keeps all of it if the variance falls.
  void attempt(int64_t link) {
    if (a_.bits[link] == a_.max_bits) return;
    changes_.clear();
    saved_ = 0;
    change(link, 1);
    if (make_room(link)) {
      while (spend()) {
      }
      if (saved_ > 0) return;
    }
    for (const auto& [changed, by] : changes_) apply(changed, -by);
  }

 private:
  static constexpr int64_t kNone = -1;

  // All links of a sender or of a receiver.
  struct Line {
    int64_t first;
    int64_t step;
  };

  int64_t variance(int64_t link, int bits) const { return a_.rows[link] * kVariances[bits]; }

  void apply(int64_t link, int by) {
    const int64_t spent = a_.rows[link] * by;
    a_.left.senders[link / a_.ranks] -= spent;
    a_.left.receivers[link % a_.ranks] -= spent;
    a_.left.all -= spent;
    a_.bits[link] += by;
  }

  void change(int64_t link, int by) {
    const int bits = a_.bits[link];
    saved_ += variance(link, bits) - variance(link, bits + by);
    apply(link, by);
    changes_.emplace_back(link, by);
  }

  Line links_of_sender(int64_t s) const { return {s * a_.ranks, 1}; }
  Line links_of_receiver(int64_t d) const { return {d, a_.ranks}; }

  // Brings the nodes of a link back into their budgets; false if that cannot be done.
  bool make_room(int64_t link) {
    const int64_t s = link / a_.ranks, d = link % a_.ranks;
    touched_ = {links_of_sender(s), links_of_receiver(d)};
    if (a_.left.senders[s] < 0) {
      const int64_t lowered = lower_cheapest(links_of_sender(s), link, -a_.left.senders[s]);
      if (lowered == kNone) return false;
      touched_.push_back(links_of_receiver(lowered % a_.ranks));
    }
    if (a_.left.receivers[d] < 0) {
      const int64_t lowered = lower_cheapest(links_of_receiver(d), link, -a_.left.receivers[d]);
      if (lowered == kNone) return false;
      touched_.push_back(links_of_sender(lowered / a_.ranks));
    }
    return a_.left.all >= 0;
  }

  // Takes what is needed from the link that loses least by it; returns the link.
  int64_t lower_cheapest(Line line, int64_t spared, int64_t needed) {
    int64_t best = kNone;
    int64_t best_by = 0;
    int64_t lowest = 0;
    for (int64_t i = 0, link = line.first; i < a_.ranks; ++i, link += line.step) {
      if (link == spared || a_.rows[link] == 0) continue;
      const int64_t by = (needed + a_.rows[link] - 1) / a_.rows[link];
      const int64_t bits = a_.bits[link];
      if (bits - by < a_.min_bits) continue;
      const int64_t loss = variance(link, bits - by) - variance(link, bits);
      if (best == kNone || loss < lowest) {
        best = link;
        best_by = by;
        lowest = loss;
      }
    }
    if (best != kNone) change(best, -static_cast<int>(best_by));
    return best;
  }

  // Raises the link that gains most; false if none can be raised.
  bool spend() {
    int64_t best = kNone;
    int64_t highest = 0;
    for (const Line& line : touched_) {
      for (int64_t i = 0, link = line.first; i < a_.ranks; ++i, link += line.step) {
        const int bits = a_.bits[link];
        const int64_t left = std::min(
            {a_.left.senders[link / a_.ranks], a_.left.receivers[link % a_.ranks], a_.left.all});
        if (bits == a_.max_bits || a_.rows[link] > left) continue;
        const int64_t gain = variance(link, bits) - variance(link, bits + 1);
        if (gain > highest) {
          best = link;
          highest = gain;
        }
      }
    }
    if (best != kNone) change(best, 1);
    return best != kNone;
  }

  Allocation& a_;
  std::vector<std::pair<int64_t, int>> changes_;
  std::vector<Line> touched_;
  int64_t saved_ = 0;
};

}  // namespace

void exchange_bits(Allocation& a) {
  Exchange exchange(a);
  for (int64_t link = 0; link < a.ranks * a.ranks; ++link) exchange.attempt(link);
}

}  // namespace moe_comp
