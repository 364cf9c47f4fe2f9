// One NIXL agent with the UCX backend, through the C API of the installed wheel (libnixl_capi.so), loaded late.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>

namespace jax_nixlep {

struct NixlError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class NixlAgent {
 public:
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
    ~Transfer();
    // True once the bytes are where they belong. Throws NixlError if the transfer failed.
    bool Done();

   private:
    NixlAgent* agent_ = nullptr;
    void* request_ = nullptr;
  };

  // `library`: path of libnixl_capi.so. Throws NixlError if it is missing, a stub, or lacks a function.
  NixlAgent(const std::string& library, const std::string& name);
  ~NixlAgent();

  void Register(std::byte* data, size_t num_bytes);
  // What a peer needs to reach this agent's registered memory.
  std::string Metadata() const;
  // Makes the agent that `metadata` describes reachable; returns its name.
  std::string Connect(const std::string& metadata);
  void Disconnect(const std::string& peer);

 private:
  struct Api;
  void Close();

  std::unique_ptr<Api> api_;
  void* agent_ = nullptr;
  void* backend_ = nullptr;
  void* options_ = nullptr;
  void* registered_ = nullptr;
};

}  // namespace jax_nixlep
