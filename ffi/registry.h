// Which endpoint serves which local device. Programs name no endpoint, so a compiled program serves every group.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

namespace jax_nixlep {

template <typename Endpoint>
class RegistryOf {
 public:
  static RegistryOf& Get() {
    static RegistryOf registry;
    return registry;
  }
  std::shared_ptr<Endpoint> Find(int32_t device) {
    std::lock_guard lock(mutex_);
    auto found = endpoints_.find(device);
    return found == endpoints_.end() ? nullptr : found->second;
  }
  void Set(int32_t device, std::shared_ptr<Endpoint> endpoint) {
    std::lock_guard lock(mutex_);
    if (endpoint) {
      endpoints_[device] = std::move(endpoint);
    } else {
      endpoints_.erase(device);
    }
  }

 private:
  std::mutex mutex_;
  std::map<int32_t, std::shared_ptr<Endpoint>> endpoints_;
};

}  // namespace jax_nixlep
