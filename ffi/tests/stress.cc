// Ranks as threads of one process, for the sanitizers: many operations with random routing, checked value by value,
// groups that part when they are done, then a rank that leaves, a rank that is late, and ranks that disagree. Exits
// with 1 and says what was wrong.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "host/ops.h"

using namespace jax_nixlep;

namespace {

constexpr int kRanks = 4, kExperts = 3, kTokens = 7, kTopK = 3, kHidden = 128;
constexpr int kRows = kRanks * kTokens * kTopK;

void Require(bool ok, const std::string& what) {
  if (ok) return;
  std::fprintf(stderr, "stress: %s\n", what.c_str());
  std::_Exit(1);
}

std::vector<std::shared_ptr<Endpoint>> MakeGroup(double timeout_s) {
  std::vector<std::shared_ptr<Endpoint>> group;
  for (int r = 0; r < kRanks; ++r) {
    Capacity capacity{kRanks, kExperts, kTokens, kTopK, kHidden * sizeof(float)};
    group.push_back(std::make_shared<Endpoint>(EndpointOptions{r, capacity, timeout_s, false}));
  }
  std::vector<int> members;
  for (int r = 0; r < kRanks; ++r) members.push_back(r);
  for (auto& endpoint : group) {
    for (auto& peer : group) {
      if (peer != endpoint) Require(endpoint->AttachPeer(peer->rank(), peer->memory(), peer->nonce()), "attach");
    }
  }
  for (auto& endpoint : group) endpoint->Activate(1, members);
  return group;
}

// The buffers of one rank and the two operations on them.
struct Rank {
  std::vector<float> x, weights, rows, row_weights, y;
  std::vector<int32_t> ids, clean_ids, row_of, group_sizes, demand, peers;
  int32_t dropped = 0, invalid_ids = 0;
  int num_tokens = kTokens;

  Rank()
      : x(kTokens * kHidden),
        weights(kTokens * kTopK),
        rows(kRows * kHidden),
        row_weights(kRows),
        y(kTokens * kHidden),
        ids(kTokens * kTopK),
        clean_ids(ids.size()),
        row_of(kRanks * kTokens * kTopK),
        group_sizes(kExperts),
        demand(kExperts),
        peers(kRanks) {}

  void Fill(std::mt19937& random) {
    num_tokens = int(random() % (kTokens + 1));
    for (float& v : x) v = float(int(random() % 17)) - 8;
    for (float& w : weights) w = float(random() % 8) / 4;
    for (int32_t& id : ids) id = int32_t(random() % (kRanks * kExperts + 2)) - 1;
  }
  void Dispatch(Endpoint& endpoint, Wire wire, uint32_t ordinal) {
    DispatchArgs args{.format = {.wire = wire, .hidden = kHidden},
                      .ordinal = ordinal,
                      .num_tokens = num_tokens,
                      .num_rows = kRows,
                      .x = reinterpret_cast<std::byte*>(x.data()),
                      .ids = ids.data(),
                      .weights = weights.data(),
                      .rows = reinterpret_cast<std::byte*>(rows.data()),
                      .scales = nullptr,
                      .row_weights = row_weights.data(),
                      .group_sizes = group_sizes.data(),
                      .demand = demand.data(),
                      .clean_ids = clean_ids.data(),
                      .row_of = row_of.data(),
                      .peers = peers.data(),
                      .dropped = &dropped,
                      .invalid_ids = &invalid_ids};
    jax_nixlep::Dispatch(endpoint, args);
  }
  void Combine(Endpoint& endpoint, uint32_t ordinal) {
    CombineArgs args{.format = {.hidden = kHidden},
                     .ordinal = ordinal,
                     .num_tokens = num_tokens,
                     .num_rows = kRows,
                     .rows = reinterpret_cast<std::byte*>(rows.data()),
                     .row_weights = row_weights.data(),
                     .row_scalars = nullptr,
                     .row_of = row_of.data(),
                     .y = reinterpret_cast<std::byte*>(y.data()),
                     .scalars = nullptr};
    jax_nixlep::Combine(endpoint, args);
  }
  // Every expert is the identity and all numbers are small integers or quarters: sums are exact in float32.
  void CheckIdentity() {
    for (int t = 0; t < num_tokens; ++t) {
      float total = 0;
      for (int k = 0; k < kTopK; ++k) {
        const int32_t id = ids[t * kTopK + k];
        if (id >= 0 && id < kRanks * kExperts) total += weights[t * kTopK + k];
      }
      for (int h = 0; h < kHidden; ++h) {
        Require(y[t * kHidden + h] == total * x[t * kHidden + h], "a sum is wrong");
      }
    }
  }
};

void OnEachRank(const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int r = 0; r < kRanks; ++r) threads.emplace_back(body, r);
  for (auto& thread : threads) thread.join();
}

// Runs `body`; returns the text of its EpError, or "".
std::string ErrorOf(const std::function<void()>& body) {
  try {
    body();
    return "";
  } catch (const EpError& error) {
    return error.what();
  }
}

void ManyOperations(int steps) {
  auto group = MakeGroup(/*timeout_s=*/60);
  OnEachRank([&](int r) {
    std::mt19937 random(100 + r);
    Rank rank;
    for (int step = 0; step < steps; ++step) {
      rank.Fill(random);
      rank.Dispatch(*group[r], step % 2 ? Wire::kBf16 : Wire::kSame, uint32_t(step));
      rank.Combine(*group[r], uint32_t(step));
      rank.CheckIdentity();
      if (step % 64 == 0) group[r]->Health((r + 1) % kRanks);
    }
  });
}

// A thread looks, and connects and drops a rank that is no member, while the members work.
void LinksChange(int steps) {
  auto group = MakeGroup(60);
  const std::vector<int> members = {0, 1, 2};
  for (int r : members) group[r]->Activate(2, members);
  std::atomic<bool> done = false;
  std::thread changer([&] {
    while (!done) {
      group[0]->DropPeer(3);
      Require(group[0]->AttachPeer(3, group[3]->memory(), group[3]->nonce()), "attach");
    }
  });
  std::thread watcher([&] {
    while (!done) {
      for (int r = 0; r < kRanks; ++r) Require(group[0]->PeerAlive(r) && group[0]->Health(r).path, "health");
    }
  });
  OnEachRank([&](int r) {
    if (r == 3) return;
    std::mt19937 random(r);
    Rank rank;
    for (int step = 0; step < steps; ++step) {
      rank.Fill(random);
      for (int32_t& id : rank.ids) id = std::min(id, 3 * kExperts - 1);  // of members
      rank.Dispatch(*group[r], Wire::kSame, uint32_t(step));
      rank.Combine(*group[r], uint32_t(step));
      rank.CheckIdentity();
    }
  });
  done = true;
  changer.join();
  watcher.join();
}

// Whoever is done with the last operation leaves; the others, who may not have looked yet, must still see that it did.
void EachLeavesWhenDone(int groups) {
  for (int i = 0; i < groups; ++i) {
    auto group = MakeGroup(60);
    OnEachRank([&](int r) {
      std::mt19937 random(r);
      Rank rank;
      rank.Fill(random);
      std::string error = ErrorOf([&] {
        rank.Dispatch(*group[r], Wire::kSame, 1);
        rank.Combine(*group[r], 2);
      });
      group[r]->Close();
      Require(error.empty(), "an operation that all took part in failed: " + error);
    });
  }
}

void OneLeaves() {
  auto group = MakeGroup(60);
  OnEachRank([&](int r) {
    Rank rank;
    if (r == 2) return group[r]->Close();
    std::string error = ErrorOf([&] { rank.Dispatch(*group[r], Wire::kSame, 1); });
    Require(error.find("rank 2 has left") != std::string::npos || error.find("failed; see") != std::string::npos,
            "leaving was reported as: " + error);
  });
}

void OneIsLate() {
  auto group = MakeGroup(0.3);
  OnEachRank([&](int r) {
    Rank rank;
    if (r == 1) usleep(900'000);
    std::string error = ErrorOf([&] {
      rank.Dispatch(*group[r], Wire::kSame, 1);
      rank.Combine(*group[r], 2);
    });
    Require(!error.empty(), "a late rank went unnoticed");
  });
}

void TheyDisagree() {
  auto group = MakeGroup(60);
  OnEachRank([&](int r) {
    Rank rank;
    std::string error = ErrorOf([&] { rank.Dispatch(*group[r], r == 3 ? Wire::kBf16 : Wire::kSame, 1); });
    Require(!error.empty(), "different formats were exchanged");
  });
}

void ClosedWhileWaiting() {
  auto group = MakeGroup(60);
  std::thread waiter([&] {
    Rank rank;
    std::string error = ErrorOf([&] { rank.Dispatch(*group[0], Wire::kSame, 1); });
    Require(error.find("shut down while waiting") != std::string::npos ||
                error.find("shut down; call") != std::string::npos,
            "closing was reported as: " + error);
  });
  usleep(100'000);
  group[0]->Close();
  waiter.join();
}

}  // namespace

int main(int argc, char** argv) {
  const int steps = argc > 1 ? std::atoi(argv[1]) : 500;
  ManyOperations(steps);
  LinksChange(steps / 4);
  EachLeavesWhenDone(steps / 4);
  OneLeaves();
  OneIsLate();
  TheyDisagree();
  ClosedWhileWaiting();
  std::printf("stress: passed\n");
}
