// One NIXL agent with the UCX backend, through the C API of the installed wheel (libnixl_capi.so), loaded late.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace jax_nixlep {

struct NixlError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class NixlAgent {
 public:
  static constexpr int kHost = -1;

  enum class Direction { kRead = 0, kWrite = 1 };  // values of NIXL's C ABI
  // A piece to move: the same length at `local` here and at `remote` in the peer's memory.
  struct Piece {
    const std::byte* local;
    uint64_t remote;
    size_t num_bytes;
  };

  // A posted write or read. Must be done, or abandoned with its agent, before the local memory is reused.
  class Transfer {
   public:
    Transfer() = default;  // nothing to move: done
    Transfer(NixlAgent& agent, const std::string& peer, std::span<const Piece> pieces,
             Direction direction = Direction::kWrite);
    Transfer(Transfer&& other) noexcept { *this = std::move(other); }
    Transfer& operator=(Transfer&& other) noexcept {
      std::swap(agent_, other.agent_);
      std::swap(request_, other.request_);
      return *this;
    }
    ~Transfer() { Release(); }
    // True once the bytes are where they belong. Throws NixlError if the transfer failed.
    bool Done();

   private:
    void Release();

    NixlAgent* agent_ = nullptr;
    void* request_ = nullptr;
  };

  // `library`: path of libnixl_capi.so. Throws NixlError if it is missing, a stub, or lacks a function.
  // `gpu`: the CUDA device whose memory is registered, and whose context must be current; kHost for host memory.
  NixlAgent(const std::string& library, const std::string& name, int gpu = kHost);
  ~NixlAgent();

  void Register(std::byte* data, size_t num_bytes);
  // What a peer needs to reach this agent's registered memory.
  std::string Metadata() const;
  // Makes the agent that `metadata` describes reachable; returns its name.
  std::string Connect(const std::string& metadata);
  void Disconnect(const std::string& peer);

  // Short messages between connected agents, in no order.
  void Tell(const std::string& peer, const std::string& message);
  // What was told since the last call.
  std::vector<std::string> Told();

  // A row of a memory view: registered memory, of this agent or of a peer. A remote row without an agent is a hole,
  // which must not be used.
  struct ViewRow {
    uint64_t base = 0;
    size_t num_bytes = 0;
    int device = 0;
    std::string agent = {};
  };
  // Memory views: handles that kernels use to write to peers. Release them before the agent goes.
  void* LocalView(std::span<const ViewRow> rows);
  void* RemoteView(std::span<const ViewRow> rows);
  void ReleaseView(void* view);

 private:
  struct Api;
  void Close();

  std::unique_ptr<Api> api_;
  const int gpu_;
  void* agent_ = nullptr;
  void* backend_ = nullptr;
  void* options_ = nullptr;
  std::vector<void*> registered_;
};

}  // namespace jax_nixlep
