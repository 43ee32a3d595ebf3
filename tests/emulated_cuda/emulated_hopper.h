// csrc/cuda/hopper.h for the emulator, from the words of the PTX manual: what a barrier counts, where a copy puts a
// box's numbers, which bytes a product reads by its descriptor, and which sums a lane holds.
//
// Copies and products are asynchronous: they may be done as soon as they begin or as late as somebody waits for them.
// LATRO_EMULATOR_LATE names what is late: "copies" land when no thread can go on without them, the last begun first;
// "products" read their operands when their thread waits for them. A kernel that is right does not notice: one that
// reads too early finds NaN or old sums, one that gives memory back too early has it overwritten.
//
// Not emulated: what a block's exit does to its neighbours' arrivals, memory fences, the number of registers.
#pragma once

#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <vector>

namespace latro::hopper {

struct TensorMap {
  const char* matrix;
  int64_t rows;
  int64_t columns;
  int64_t stride;  // bytes
  int box_rows;
  int bytes;  // of a number
};

template <class T>
TensorMap tensor_map(const T* matrix, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
  const TensorMap map = {reinterpret_cast<const char*>(matrix),    rows,     columns,
                         stride * static_cast<int64_t>(sizeof(T)), box_rows, sizeof(T)};
  const bool fits = reinterpret_cast<uintptr_t>(matrix) % 16 == 0 && map.stride % 16 == 0 && rows > 0 && columns > 0 &&
                    map.stride < int64_t{1} << 40 && box_rows > 0 && box_rows <= 256;
  if (!fits) {
    throw std::runtime_error("tensor_map: the driver would refuse this matrix");
  }
  return map;
}

inline int multiprocessors() {
  return 6;  // so few that their blocks have several tiles each
}

inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(static_cast<const char*>(shared) - dynamic_shared());
}

inline int cluster_rank() {
  return static_cast<int>(emulated::this_thread().rank);
}

namespace asynchronous {

inline bool is_late(const char* what) {
  const char* late = std::getenv("LATRO_EMULATOR_LATE");
  return late && std::strstr(late, what);
}

// A barrier's 64 bits.
struct Count {
  int32_t bytes;  // expected and not landed; less than 0 when they landed first
  int16_t missing;
  uint16_t expected : 15;
  uint16_t parity : 1;
};
static_assert(sizeof(Count) == sizeof(Barrier));

constexpr uint16_t NOT_MADE = 0x7fff;  // memory starts with all bits set

inline Count& count_of(Barrier& barrier) {
  Count& count = reinterpret_cast<Count&>(barrier);
  if (count.expected == NOT_MADE) {
    emulated::fail("a barrier is used before it is made");
  }
  return count;
}

inline void change(Barrier& barrier, int arrivals, int64_t bytes) {
  constexpr int64_t MOST_BYTES = (1 << 20) - 1;
  Count& count = count_of(barrier);
  if (arrivals > count.missing) {
    emulated::fail("more arrive at a barrier than it was made for");
  }
  if (std::abs(count.bytes + bytes) > MOST_BYTES) {
    emulated::fail("a barrier counts more bytes than it can");
  }
  count.missing -= arrivals;
  count.bytes += bytes;
  if (count.missing == 0 && count.bytes == 0) {
    count.missing = count.expected;
    count.parity ^= 1;
  }
}

struct Copy {
  TensorMap map;
  int64_t row;
  int64_t column;
  char* to;
  Barrier* barrier;
  unsigned cluster;

  void land() const {
    for (int64_t r = 0; r < map.box_rows; ++r) {
      for (int64_t byte = 0; byte < ROW_BYTES; byte += map.bytes) {
        const int64_t c = column + byte / map.bytes;
        const bool inside = 0 <= row + r && row + r < map.rows && 0 <= c && c < map.columns;
        char* place = to + r * ROW_BYTES + byte;
        place += swizzle(place) - reinterpret_cast<uintptr_t>(place);
        if (inside) {
          std::memcpy(place, map.matrix + (row + r) * map.stride + c * map.bytes, map.bytes);
        } else {
          std::memset(place, 0, map.bytes);
        }
      }
    }
    change(*barrier, 0, -map.box_rows * ROW_BYTES);
  }

  static uintptr_t swizzle(const void* place) {
    const auto address = reinterpret_cast<uintptr_t>(place);
    return address ^ (address / 128 % 8 * 16);
  }
};

struct Product {
  void (*run)(float* sums, uint64_t a, uint64_t b, bool add);
  float* sums;
  uint64_t a;
  uint64_t b;
  bool add;
};

// What a thread has begun. Products of a group that is committed are all before the group's end.
struct Products {
  std::vector<Product> begun;
  std::vector<size_t> groups;
  bool fenced = false;
};

// Of a launch: the emulator keeps it, as what happens late, until the next launch.
struct State {
  std::vector<Copy> copies;
  std::vector<Products> products;
  unsigned waiting = 0;
  unsigned meetings = 0;
};

inline State& state() {
  static std::weak_ptr<State> of_launch;
  std::shared_ptr<State> state = of_launch.lock();
  if (!state) {
    state = std::make_shared<State>();
    of_launch = state;
    emulated::when_stuck([state] {
      if (state->copies.empty()) {
        return false;
      }
      const Copy last = state->copies.back();
      state->copies.pop_back();
      last.land();
      return true;
    });
  }
  return *state;
}

inline Products& products_of_thread() {
  const emulated::Thread self = emulated::this_thread();
  const size_t block = blockDim.x * blockDim.y * blockDim.z;
  std::vector<Products>& all = state().products;
  all.resize(block * self.cluster);
  return all[block * self.rank + self.thread];
}

// 8 numbers of a row, 16 bytes, of the tile that a descriptor describes.
template <class T>
void read_run(uint64_t descriptor, int row, int run, float (&numbers)[8]) {
  constexpr uint64_t SWIZZLE_128 = 1;
  const uint64_t begin = (descriptor & 0x3fff) * 16;
  const uint64_t eight_rows = (descriptor >> 32 & 0x3fff) * 16;
  if (descriptor >> 62 != SWIZZLE_128 || (descriptor >> 49 & 7) != 0) {
    emulated::fail("a product of a kind of tile that is not emulated");
  }
  const uint64_t address = begin + row / 8 * eight_rows + row % 8 * ROW_BYTES + run * 16;
  const char* place = dynamic_shared() + (address ^ (address / 128 % 8 * 16));
  T rounded[8];
  std::memcpy(rounded, place, sizeof(rounded));
  std::copy(rounded, rounded + 8, numbers);
}

template <class T>
void multiply_64_256_16(float* sums, uint64_t a, uint64_t b, bool add) {
  const unsigned thread = emulated::this_thread().thread;
  const int lane = thread % 32;
  const int warp = thread / 32 % 4;
  float rows[2][2][8];
  for (int r = 0; r < 2; ++r) {
    for (int run = 0; run < 2; ++run) {
      read_run<T>(a, 16 * warp + lane / 4 + 8 * r, run, rows[r][run]);
    }
  }
  for (int j = 0; j < 32; ++j) {
    for (int c = 0; c < 2; ++c) {
      float column[2][8];
      for (int run = 0; run < 2; ++run) {
        read_run<T>(b, 8 * j + 2 * (lane % 4) + c, run, column[run]);
      }
      for (int r = 0; r < 2; ++r) {
        float& sum = sums[4 * j + 2 * r + c];
        float product = 0;
        for (int run = 0; run < 2; ++run) {
          for (int i = 0; i < 8; ++i) {
            product += rows[r][run][i] * column[run][i];
          }
        }
        sum = add ? sum + product : product;
      }
    }
  }
}

inline void run_until(Products& products, size_t groups_left) {
  if (products.groups.size() <= groups_left) {
    return;
  }
  const size_t done = products.groups[products.groups.size() - groups_left - 1];
  for (size_t i = 0; i < done; ++i) {
    const Product& product = products.begun[i];
    product.run(product.sums, product.a, product.b, product.add);
  }
  products.begun.erase(products.begun.begin(), products.begun.begin() + done);
  products.groups.erase(products.groups.begin(), products.groups.end() - groups_left);
  for (size_t& end : products.groups) {
    end -= done;
  }
}

}  // namespace asynchronous

inline void cluster_sync(emulated::Where where = emulated::Where::current()) {
  asynchronous::State& state = asynchronous::state();
  const emulated::Thread self = emulated::this_thread();
  const unsigned meeting = state.meetings;
  if (++state.waiting == blockDim.x * blockDim.y * blockDim.z * self.cluster) {
    state.waiting = 0;
    ++state.meetings;
  }
  emulated::yield_until("hopper::cluster_sync", [&state, meeting] { return state.meetings != meeting; }, where);
}

inline void init(Barrier& barrier, int arrivals) {
  reinterpret_cast<asynchronous::Count&>(barrier) = {
      .bytes = 0,
      .missing = static_cast<int16_t>(arrivals),
      .expected = static_cast<uint16_t>(arrivals),
      .parity = 0,
  };
}

inline void publish_barriers() {
}

inline void arrive_expecting(Barrier& barrier, int bytes) {
  asynchronous::change(barrier, 0, bytes);
  asynchronous::change(barrier, 1, 0);
}

template <class T>
T& in_block(T& shared, int rank) {
  return *reinterpret_cast<T*>(emulated::shared_of(rank) + shared_address(&shared));
}

inline void arrive_at(Barrier& barrier, int rank) {
  asynchronous::change(in_block(barrier, rank), 1, 0);
}

inline void wait(Barrier& barrier, int parity, emulated::Where where = emulated::Where::current()) {
  const asynchronous::Count& count = asynchronous::count_of(barrier);
  emulated::yield_until("hopper::wait", [&count, parity] { return count.parity != parity; }, where);
}

inline void copy_box_to(uint16_t ranks, const TensorMap& map, int64_t row, int64_t column, void* to, Barrier& barrier) {
  const emulated::Thread self = emulated::this_thread();
  if (shared_address(to) % SWIZZLE_BYTES != 0) {
    emulated::fail("a copy to where the swizzle does not begin");
  }
  std::vector<asynchronous::Copy>& copies = asynchronous::state().copies;
  for (unsigned rank = 0; rank < self.cluster; ++rank) {
    if (ranks >> rank & 1) {
      char* there = &in_block(*static_cast<char*>(to), rank);
      copies.push_back({map, row, column, there, &in_block(barrier, rank), self.block / self.cluster});
    }
  }
  if (copies.front().cluster != copies.back().cluster) {
    emulated::fail("a block ended before what it copied had landed");
  }
  while (!copies.empty() && !asynchronous::is_late("copies")) {
    copies.back().land();
    copies.pop_back();
  }
}

inline void copy_box(const TensorMap& map, int64_t row, int64_t column, void* to, Barrier& barrier) {
  copy_box_to(1 << cluster_rank(), map, row, column, to, barrier);
}

template <int REGISTERS>
void keep_registers() {
}

template <int REGISTERS>
void take_registers() {
}

inline void begin_products() {
  asynchronous::products_of_thread().fenced = true;
}

inline void commit_products() {
  asynchronous::Products& products = asynchronous::products_of_thread();
  products.groups.push_back(products.begun.size());
}

template <int GROUPS>
void wait_for_products() {
  asynchronous::run_until(asynchronous::products_of_thread(), GROUPS);
}

template <int COUNT>
void finish_products(float (& /*accumulators*/)[COUNT]) {
  wait_for_products<0>();
  asynchronous::products_of_thread().fenced = false;  // its sums are for others to touch
}

template <class T>
void begin_product_64_256_16(float (&sums)[128], uint64_t a, uint64_t b, bool add) {
  asynchronous::Products& products = asynchronous::products_of_thread();
  if (!products.fenced) {
    emulated::fail("a product before begin_products");
  }
  const asynchronous::Product product = {&asynchronous::multiply_64_256_16<T>, sums, a, b, add};
  if (asynchronous::is_late("products")) {
    products.begun.push_back(product);
  } else {
    product.run(product.sums, product.a, product.b, product.add);
  }
}

template <class T>
uint32_t rounded_pair(float low, float high) {
  const T pair[] = {static_cast<T>(low), static_cast<T>(high)};
  return std::bit_cast<uint32_t>(pair);
}

}  // namespace latro::hopper
