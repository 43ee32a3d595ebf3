#include "emulated.h"

#include <link.h>

#include <array>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "fiber.h"

namespace emulated {
namespace {

constexpr unsigned LANES = 32;
constexpr unsigned ALL_LANES = 0xffffffff;
constexpr int POISON = 0xff;  // NaN in every floating dtype

// What a GPU of compute capability 9.0 takes.
constexpr unsigned MOST_THREADS = 1024;
constexpr unsigned MOST_BLOCKS_Y_OR_Z = 65535;
constexpr unsigned MOST_BLOCKS_IN_CLUSTER = 8;
constexpr size_t MOST_SHARED_BYTES = 227 * 1024;

struct Barrier {
  unsigned arrived = 0;
  unsigned expected = 0;  // 0: all threads that have not returned
  unsigned rounds = 0;
};

// Where the lanes of a warp hand each other values. A lane that comes again uses the other row: all have read from this
// one when it is written next.
struct Meeting {
  std::array<std::array<uint64_t, LANES>, 2> values;
  const char* what = nullptr;
  unsigned arrived = 0;
  unsigned rounds = 0;
};

struct Free {
  void operator()(char* memory) const {
    std::free(memory);
  }
};

struct Block {
  uint3 index;
  unsigned number;
  unsigned rank;
  unsigned size;
  unsigned running;
  std::unique_ptr<char, Free> shared;
  std::vector<char> static_shared;  // while a thread of another block runs
  std::array<Barrier, 16> barriers;
  std::vector<Meeting> warps;
};

struct Wait {
  const char* what = nullptr;
  bool (*ready)(void*) = nullptr;
  void* context = nullptr;
  Where where;
};

struct Running {
  uint3 index;
  unsigned number;
  Block* block;
  Fiber* fiber;
  Wait wait;
  bool returned = false;
};

// There is one launch at a time, because the variables of the language are global: threadIdx and so on.
std::mutex one_launch;
const Grid* grid;
const std::function<void()>* body;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Block> blocks;  // of the cluster that runs
std::vector<Running> threads;
std::vector<std::function<bool()>> late;
Running* current;
bool in_fiber = false;
std::string failure;

// The order of threads in a round, and of clusters in the grid.
class Order {
 public:
  Order() {
    const char* seed = std::getenv("LATRO_EMULATOR_SEED");
    shuffles_ = seed && *seed;
    random_.seed(shuffles_ ? std::strtoul(seed, nullptr, 10) : 0);
  }

  std::vector<unsigned> of(size_t count) {
    std::vector<unsigned> numbers(count);
    std::iota(numbers.begin(), numbers.end(), 0);
    change(numbers);
    return numbers;
  }

  void change(std::vector<unsigned>& numbers) {
    if (shuffles_) {
      std::shuffle(numbers.begin(), numbers.end(), random_);
    }
  }

 private:
  bool shuffles_;
  std::mt19937 random_;
};

struct Memory {
  char* begin = nullptr;
  size_t size = 0;
};

thread_local char of_this_module;

// The thread-local storage of this module.
Memory static_shared() {
  struct Search {
    const char* inside;
    Memory found;
  } search = {&of_this_module, {}};
  const auto look = [](dl_phdr_info* module, size_t, void* context) {
    auto& [inside, found] = *static_cast<Search*>(context);
    char* begin = static_cast<char*>(module->dlpi_tls_data);
    for (int i = 0; begin && i < module->dlpi_phnum; ++i) {
      const auto& header = module->dlpi_phdr[i];
      if (header.p_type == PT_TLS && begin <= inside && inside < begin + header.p_memsz) {
        found = {begin, header.p_memsz};
      }
    }
    return 0;
  };
  dl_iterate_phdr(look, &search);
  return search.found;
}

std::string text(const uint3& index) {
  std::ostringstream out;
  out << "(" << index.x << ", " << index.y << ", " << index.z << ")";
  return out.str();
}

// 0-31, 40
std::string ranges(const std::vector<unsigned>& numbers) {
  std::ostringstream out;
  for (size_t i = 0; i < numbers.size();) {
    size_t end = i + 1;
    while (end < numbers.size() && numbers[end] == numbers[end - 1] + 1) {
      ++end;
    }
    out << (i ? ", " : "") << numbers[i];
    if (end - i > 1) {
      out << "-" << numbers[end - 1];
    }
    i = end;
  }
  return out.str();
}

std::string where_threads_are() {
  std::map<std::string, std::vector<unsigned>> in_state;
  for (const Running& thread : threads) {
    std::string state = "of block " + text(thread.block->index);
    if (thread.returned) {
      state += " have returned";
    } else {
      const auto& [what, ready, context, where] = thread.wait;
      state +=
          std::string(" wait in ") + what + ", line " + std::to_string(where.line()) + " of " + where.function_name();
    }
    in_state[state].push_back(thread.number);
  }
  std::string all;
  for (const auto& [state, numbers] : in_state) {
    all += "\n  threads " + ranges(numbers) + " " + state;
  }
  return all;
}

unsigned lanes_of(const Block& block, unsigned thread) {
  return std::min(LANES, block.size - thread / LANES * LANES);
}

void open_if_all_are_there(Barrier& barrier, const Block& block) {
  if (barrier.arrived > 0 && barrier.arrived >= (barrier.expected ? barrier.expected : block.running)) {
    barrier.arrived = 0;
    ++barrier.rounds;
  }
}

// What every fiber does: one thread of a kernel after another.
void run_threads() {
  while (true) {
    (*body)();
    current->returned = true;
    Block& block = *current->block;
    --block.running;
    open_if_all_are_there(block.barriers[0], block);
    current->fiber->leave();
  }
}

// Hands in a value and returns those of all lanes of the warp.
const std::array<uint64_t, LANES>& meet(const char* what, unsigned mask, uint64_t value, Where where) {
  if (mask != ALL_LANES) {
    fail(std::string(what) + ": only the full mask is emulated");
  }
  const unsigned thread = current->number;
  Block& block = *current->block;
  Meeting& warp = block.warps[thread / LANES];
  if (warp.arrived > 0 && std::strcmp(warp.what, what) != 0) {
    fail(std::string("lanes of a warp meet in ") + warp.what + " and in " + what);
  }
  warp.what = what;
  const unsigned round = warp.rounds;
  auto& values = warp.values[round % 2];
  values[thread % LANES] = value;
  if (++warp.arrived == lanes_of(block, thread)) {
    warp.arrived = 0;
    ++warp.rounds;
  }
  yield_until(what, [&warp, round] { return warp.rounds != round; }, where);
  return values;
}

bool anything_late() {
  return std::any_of(late.begin(), late.end(), [](const auto& act) { return act(); });
}

void swap_static_shared(const Memory& place, Block* from, const Block* to) {
  if (from == to) {
    return;
  }
  if (from) {
    std::memcpy(from->static_shared.data(), place.begin, place.size);
  }
  std::memcpy(place.begin, to->static_shared.data(), place.size);
}

void resume(Running& thread) {
  thread.wait.ready = nullptr;
  threadIdx = thread.index;
  blockIdx = thread.block->index;
  in_fiber = true;
  thread.fiber->enter();
  in_fiber = false;
  if (!failure.empty()) {
    throw std::runtime_error(failure);
  }
}

void run_cluster(Order& order) {
  const Memory place = static_shared();
  Block* last = nullptr;
  std::vector<unsigned> turns = order.of(threads.size());
  for (size_t left = threads.size(); left > 0; order.change(turns)) {
    bool moved = false;
    for (unsigned turn : turns) {
      Running& thread = threads[turn];
      current = &thread;
      if (thread.returned || (thread.wait.ready && !thread.wait.ready(thread.wait.context))) {
        continue;
      }
      swap_static_shared(place, last, thread.block);
      last = thread.block;
      resume(thread);
      left -= thread.returned;
      moved = true;
    }
    if (!moved && !anything_late()) {
      failure = "emulated kernel: no thread can go on" + where_threads_are();
      throw std::runtime_error(failure);
    }
  }
}

// The x, y and z of a number that counts along x first.
uint3 index_in(const dim3& shape, unsigned number) {
  return {number % shape.x, number / shape.x % shape.y, number / shape.x / shape.y};
}

void make_block(Block& block, unsigned number, unsigned rank, unsigned size) {
  block.index = index_in(grid->grid, number);
  block.number = number;
  block.rank = rank;
  block.size = block.running = size;
  void* shared = nullptr;
  if (posix_memalign(&shared, 1024, grid->shared_bytes) != 0) {
    throw std::bad_alloc();
  }
  block.shared.reset(static_cast<char*>(shared));
  std::memset(block.shared.get(), POISON, grid->shared_bytes);
  block.static_shared.assign(static_shared().size, static_cast<char>(POISON));
  block.warps.resize((size + LANES - 1) / LANES);
  for (unsigned thread = 0; thread < size; ++thread) {
    threads.push_back({index_in(grid->block, thread), thread, &block, fibers[threads.size()].get(), {}});
  }
}

unsigned checked(const Grid& how) {
  const unsigned size = how.block.x * how.block.y * how.block.z;
  const auto& [x, y, z] = how.grid;
  const bool fits = 0 < size && size <= MOST_THREADS && x > 0 && 0 < y && y <= MOST_BLOCKS_Y_OR_Z && 0 < z &&
                    z <= MOST_BLOCKS_Y_OR_Z && how.shared_bytes <= MOST_SHARED_BYTES && 0 < how.cluster &&
                    how.cluster <= MOST_BLOCKS_IN_CLUSTER && x % how.cluster == 0;
  if (!fits) {
    std::ostringstream message;
    message << "emulated kernel: no GPU launches a grid of " << text({x, y, z}) << " blocks of " << size
            << " threads with " << how.shared_bytes << " bytes of shared memory in clusters of " << how.cluster;
    throw std::runtime_error(message.str());
  }
  return size;
}

}  // namespace

void run(const Grid& how, const std::function<void()>& kernel) {
  const std::lock_guard lock(one_launch);
  const unsigned size = checked(how);
  if (!failure.empty()) {
    fibers.clear();  // the threads on them will never go on
    failure.clear();
  }
  grid = &how;
  body = &kernel;
  blockDim = how.block;
  gridDim = how.grid;
  late.clear();
  while (fibers.size() < size * how.cluster) {
    fibers.push_back(std::make_unique<Fiber>(run_threads));
  }
  Order order;
  for (unsigned cluster : order.of(how.grid.x * how.grid.y * how.grid.z / how.cluster)) {
    threads.clear();
    blocks.clear();
    blocks.resize(how.cluster);
    for (unsigned rank = 0; rank < how.cluster; ++rank) {
      make_block(blocks[rank], cluster * how.cluster + rank, rank, size);
    }
    run_cluster(order);
  }
}

Thread this_thread() {
  return {current->number, current->block->number, current->block->rank, grid->cluster};
}

char* shared_of(unsigned rank) {
  if (rank >= blocks.size()) {
    fail("block " + std::to_string(rank) + " in a cluster of " + std::to_string(blocks.size()));
  }
  return blocks[rank].shared.get();
}

void fail(const std::string& message) {
  failure = "emulated kernel: " + message + ", thread " + std::to_string(current->number) + " of block " +
            text(current->block->index);
  if (in_fiber) {
    current->fiber->leave();
  }
  throw std::runtime_error(failure);
}

void when_stuck(std::function<bool()> act) {
  late.push_back(std::move(act));
}

void yield_until(const char* what, bool (*ready)(void*), void* context, Where where) {
  if (!ready(context)) {
    current->wait = {what, ready, context, where};
    current->fiber->leave();
  }
}

void sync_threads(int id, unsigned count, const char* what, Where where) {
  Block& block = *current->block;
  Barrier& barrier = block.barriers.at(id);
  if (barrier.arrived > 0 && barrier.expected != count) {
    fail(std::string(what) + ": threads at barrier " + std::to_string(id) + " wait for different numbers of threads");
  }
  if (count % LANES != 0) {
    fail(std::string(what) + ": waits for " + std::to_string(count) + " threads, not whole warps");
  }
  barrier.expected = count;
  const unsigned round = barrier.rounds;
  ++barrier.arrived;
  open_if_all_are_there(barrier, block);
  yield_until(what, [&barrier, round] { return barrier.rounds != round; }, where);
}

uint64_t exchange(const char* what, unsigned mask, uint64_t value, unsigned source, Where where) {
  if (source >= lanes_of(*current->block, current->number)) {
    fail(std::string(what) + ": lane " + std::to_string(source) + " of this warp does not exist");
  }
  return meet(what, mask, value, where)[source];
}

unsigned ballot(const char* what, unsigned mask, bool value, Where where) {
  const auto& values = meet(what, mask, value, where);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < lanes_of(*current->block, current->number); ++lane) {
    bits |= static_cast<unsigned>(values[lane]) << lane;
  }
  return bits;
}

}  // namespace emulated
