#include "runtime/shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace jax_nixlep {
namespace {

constexpr int kSeals = F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL;  // nobody can make a mapping fault by truncating it

[[noreturn]] void ThrowErrno(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), "shared memory: " + what);
}

struct flock WholeFile(short type) {
  struct flock lock{};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  return lock;
}

}  // namespace

SharedMemory::SharedMemory(int fd, size_t num_bytes) : fd_(fd), num_bytes_(num_bytes) {
  void* data = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) {
    int error = errno;
    close(fd);  // the destructor does not run
    errno = error;
    ThrowErrno("cannot map " + std::to_string(num_bytes) + " bytes");
  }
  data_ = static_cast<std::byte*>(data);
}

SharedMemory& SharedMemory::operator=(SharedMemory&& other) noexcept {
  std::swap(created_, other.created_);
  std::swap(fd_, other.fd_);
  std::swap(data_, other.data_);
  std::swap(num_bytes_, other.num_bytes_);
  return *this;
}

SharedMemory::~SharedMemory() {
  if (data_) munmap(data_, num_bytes_);
  if (fd_ >= 0) close(fd_);
}

SharedMemory SharedMemory::Create(size_t num_bytes) {
  int fd = memfd_create("jax_nixlep", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) ThrowErrno("memfd_create failed");
  struct flock lock = WholeFile(F_WRLCK);
  if (ftruncate(fd, off_t(num_bytes)) || fcntl(fd, F_ADD_SEALS, kSeals) || fcntl(fd, F_OFD_SETLK, &lock)) {
    int error = errno;
    close(fd);
    errno = error;
    ThrowErrno("cannot size, seal or lock a region of " + std::to_string(num_bytes) + " bytes");
  }
  SharedMemory memory(fd, num_bytes);
  memory.created_ = true;
  return memory;
}

SharedMemory SharedMemory::Open(int pid, int fd, size_t num_bytes) {
  std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(fd);
  int opened = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (opened < 0) ThrowErrno("cannot open " + path);
  struct stat info{};
  int seals = fcntl(opened, F_GET_SEALS);
  bool as_described = fstat(opened, &info) == 0 && size_t(info.st_size) == num_bytes;
  if (!as_described || seals < 0 || (seals & kSeals) != kSeals) {
    close(opened);
    throw std::runtime_error("shared memory: " + path + " is not a sealed region of " + std::to_string(num_bytes) +
                             " bytes");
  }
  return SharedMemory(opened, num_bytes);
}

bool SharedMemory::OwnerAlive() const {
  struct flock lock = WholeFile(F_WRLCK);
  return created_ || fcntl(fd_, F_OFD_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
}

}  // namespace jax_nixlep
