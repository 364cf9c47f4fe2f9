// A sealed memfd that other processes of this machine can map, and whose owner's death they can notice.
#pragma once

#include <cstddef>
#include <string>

namespace jax_nixlep {

class SharedMemory {
 public:
  // Anonymous, zeroed, of fixed size; freed by the kernel when the last mapping goes, also after a crash.
  static SharedMemory Create(size_t num_bytes);
  // Maps the memory that process `pid` created as its file descriptor `fd`. Throws std::system_error if this process
  // cannot reach it (another machine or container), std::runtime_error if it is not what its owner described.
  static SharedMemory Open(int pid, int fd, size_t num_bytes);

  SharedMemory() = default;
  SharedMemory(SharedMemory&& other) noexcept { *this = std::move(other); }
  SharedMemory& operator=(SharedMemory&& other) noexcept;
  ~SharedMemory();

  std::byte* data() const { return data_; }
  size_t size() const { return num_bytes_; }
  int fd() const { return fd_; }
  // The creating process holds a lock on the file as long as it lives; the kernel drops it with the process.
  bool OwnerAlive() const;

 private:
  SharedMemory(int fd, size_t num_bytes);  // takes over fd and maps it

  bool created_ = false;  // by this object, whose own lock would not show
  int fd_ = -1;
  std::byte* data_ = nullptr;
  size_t num_bytes_ = 0;
};

}  // namespace jax_nixlep
