// What Python's faces of the CPU and of the CUDA module have in common.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "registry.h"
#include "runtime/endpoint.h"

namespace jax_nixlep {

namespace py = pybind11;
using Unlocked = py::call_guard<py::gil_scoped_release>;

template <typename Function>
py::capsule Handler(Function* function) {
  return py::capsule(reinterpret_cast<void*>(function));
}

template <typename E>
py::bytes OpenNixl(E& endpoint, const std::string& library, const std::string& name) {
  std::string metadata;
  {
    py::gil_scoped_release unlocked;
    metadata = endpoint.OpenNixl(library, name);
  }
  return py::bytes(metadata);
}

template <typename E>
void ConnectNixl(E& endpoint, int peer, const py::bytes& metadata, uint64_t remote_base, uint64_t nonce) {
  std::string blob = metadata;
  py::gil_scoped_release unlocked;
  endpoint.ConnectNixl(peer, blob, remote_base, nonce);
}

template <typename E>
py::dict HealthOf(const E& endpoint, int rank) {
  PeerHealth health;
  {
    py::gil_scoped_release unlocked;
    health = endpoint.Health(rank);
  }
  py::dict row;
  row["member"] = health.member;
  row["masked"] = health.masked;
  row["path"] = health.path;
  row["bytes_out"] = health.bytes_out;
  row["bytes_in"] = health.bytes_in;
  row["wait_s"] = double(health.wait_us) * 1e-6;
  row["timeouts"] = health.timeouts;
  return row;
}

// Methods that mean the same on both; the rest of a class is its module's.
template <typename E>
void BindEndpoint(py::class_<E, std::shared_ptr<E>>& endpoint) {
  endpoint.def("open_nixl", &OpenNixl<E>, py::arg("library"), py::arg("name"))
      .def("connect_nixl", &ConnectNixl<E>, py::arg("peer"), py::arg("metadata"), py::arg("remote_base"),
           py::arg("nonce"))
      .def(
          "activate", [](E& e, int epoch, const std::vector<int>& members) { e.Activate(uint16_t(epoch), members); },
          py::arg("epoch"), py::arg("members"), Unlocked())
      .def("failure", &E::Failure, "Why no operation can run until `activate`; '' if they can.")
      .def("close", &E::Close, Unlocked())
      .def("health", &HealthOf<E>, py::arg("rank"))
      .def_property_readonly("epoch", &E::epoch)
      .def_property_readonly("num_operations", &E::num_operations);
}

// The same, for what elastic groups need besides.
template <typename E>
void BindElastic(py::class_<E, std::shared_ptr<E>>& endpoint) {
  endpoint
      .def(
          "prepare", [](E& e, const std::vector<int>& members) { e.Prepare(members); }, py::arg("members"), Unlocked(),
          "Makes ready what `activate` with these members needs; operations go on.")
      .def("drop_peer", &E::DropPeer, py::arg("peer"), Unlocked())
      .def("interrupt", &E::Interrupt, "Ends the running operation; refuses others until `activate`.")
      .def("drain", &E::Drain, Unlocked(), "Returns when no operation runs.")
      .def("peer_alive", &E::PeerAlive, py::arg("peer"), "False once a peer of this machine is known to be dead.")
      .def("shows_death", &E::ShowsDeath, py::arg("peer"), "Whether `peer_alive` would tell.")
      .def("gave_up", &E::GaveUp, "Whether a member was given up since `activate`.");
}

template <typename E>
void BindSetEndpoint(py::module_& m, const char* name = "set_endpoint") {
  m.def(
      name, [](int device, std::shared_ptr<E> endpoint) { RegistryOf<E>::Get().Set(device, std::move(endpoint)); },
      py::arg("device"), py::arg("endpoint").none(true),
      "Operations of local device `device` use `endpoint` (or none).");
}

}  // namespace jax_nixlep
