// Which logits a call makes: a hidden row that is scored several times at one temperature is projected once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "problem.h"

namespace latro::linear_logprobs {

inline int64_t round_up(int64_t x, int64_t to) {
  return (x + to - 1) / to * to;
}

// Consecutive projected tokens, and where each scored token is among them.
struct Block {
  int64_t first;  // of all projected tokens
  std::vector<int64_t> rows;
  std::vector<float> scale;
  std::vector<float> inv_temperature;
  std::vector<Target> targets;

  Tokens tokens() const {
    const int64_t padded = scale.size();
    return {
        static_cast<int64_t>(rows.size()),   padded, rows.data(), scale.data(), inv_temperature.data(), targets.data(),
        static_cast<int64_t>(targets.size())};
  }
};

struct Place {
  int64_t token;   // in its block
  int64_t target;  // in its block
};

struct Plan {
  std::vector<Block> blocks;
  std::vector<std::vector<int64_t>> members;  // of each block, the scored tokens
  std::vector<Place> places;                  // [M]

  Plan(
      const int64_t* rows,
      const int64_t* targets,
      const std::vector<double>& temperatures,
      float logit_scale,
      int64_t most_tokens)
      : places(temperatures.size()) {
    const int64_t M = temperatures.size();
    std::vector<int64_t> order(M);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return std::make_pair(rows[a], temperatures[a]) < std::make_pair(rows[b], temperatures[b]);
    });
    int64_t count = 0;
    for (int64_t i = 0; i < M; ++i) {
      const int64_t m = order[i];
      const int64_t before = i ? order[i - 1] : -1;
      if (i == 0 || rows[m] != rows[before] || temperatures[m] != temperatures[before]) {
        if (count % most_tokens == 0) {
          blocks.push_back({count, {}, {}, {}, {}});
          members.emplace_back();
        }
        blocks.back().rows.push_back(rows[m]);
        blocks.back().scale.push_back(static_cast<float>(logit_scale / temperatures[m]));
        blocks.back().inv_temperature.push_back(static_cast<float>(1 / temperatures[m]));
        ++count;
      }
      places[m].token = blocks.back().rows.size() - 1;
      members.back().push_back(m);
    }
    for (size_t b = 0; b < blocks.size(); ++b) {
      place_targets(blocks[b], members[b], targets);
      const int64_t padded = round_up(blocks[b].rows.size(), LANES);
      blocks[b].scale.resize(padded, 1);
      blocks[b].inv_temperature.resize(padded, 1);
    }
  }

  void place_targets(Block& block, std::vector<int64_t> of_block, const int64_t* targets) {
    const auto key = [&](int64_t m) { return std::make_pair(targets[m], places[m].token); };
    std::sort(of_block.begin(), of_block.end(), [&](int64_t a, int64_t b) { return key(a) < key(b); });
    for (size_t i = 0; i < of_block.size(); ++i) {
      const int64_t m = of_block[i];
      if (i == 0 || key(m) != key(of_block[i - 1])) {
        block.targets.push_back({static_cast<int32_t>(targets[m]), static_cast<int32_t>(places[m].token)});
      }
      places[m].target = block.targets.size() - 1;
    }
  }
};

}  // namespace latro::linear_logprobs
