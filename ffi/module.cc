// Python's face of the CPU module: endpoints, handlers, and every constant that Python needs.
#include <unistd.h>

#include <chrono>
#include <tuple>

#include "binding.h"
#include "host/handlers.h"
#include "host/ops.h"

using namespace jax_nixlep;

namespace {

py::dict Address(const Endpoint& endpoint) {
  py::dict address;
  address["pid"] = getpid();
  address["fd"] = endpoint.memory()->fd();
  address["nonce"] = endpoint.nonce();
  address["base"] = reinterpret_cast<uintptr_t>(endpoint.memory()->data());
  return address;
}

std::shared_ptr<Endpoint> MakeEndpoint(int rank, int max_ranks, int experts_per_rank, int max_tokens, int top_k,
                                       int64_t row_bytes, double timeout_s, bool mask_late_peers) {
  Capacity capacity{max_ranks, experts_per_rank, max_tokens, top_k, int64_t(AlignUp(size_t(row_bytes)))};
  return std::make_shared<Endpoint>(EndpointOptions{rank, capacity, timeout_s, mask_late_peers});
}

// Registers a region with a NIXL agent of its own, for peers to read, and reads those of peers into it.
class RegionAgent {
 public:
  RegionAgent(const std::string& library, const std::string& name, std::shared_ptr<SharedMemory> region)
      : region_(std::move(region)), agent_(library, name) {
    agent_.Register(region_->data(), region_->size());
  }
  std::string Metadata() const { return agent_.Metadata(); }
  std::string Connect(const std::string& metadata) { return agent_.Connect(metadata); }
  // Reads pieces (offset here, address there, bytes); throws NixlError if that fails or takes longer.
  void Read(const std::string& peer, const std::vector<std::tuple<size_t, uint64_t, size_t>>& pieces,
            double timeout_s) {
    std::vector<NixlAgent::Piece> list;
    for (auto [offset, remote, num_bytes] : pieces) {
      if (offset > region_->size() || num_bytes > region_->size() - offset)
        throw NixlError("nixl: read past the region");
      list.push_back({region_->data() + offset, remote, num_bytes});
    }
    NixlAgent::Transfer transfer(agent_, peer, list, NixlAgent::Direction::kRead);
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(timeout_s);
    while (!transfer.Done()) {
      if (std::chrono::steady_clock::now() > end) throw NixlError("nixl: a read took longer than its deadline");
      usleep(50);
    }
  }

 private:
  std::shared_ptr<SharedMemory> region_;
  NixlAgent agent_;
};

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "jax_nixlep on the CPU: endpoints of expert-parallel groups, and XLA FFI handlers";
  m.attr("XLA_FFI_API_VERSION") = py::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  m.attr("WIRE_VERSION") = kWireVersion;
  m.attr("QUANT_BLOCK") = kQuantBlock;
  m.attr("AMAX_FLOOR") = kAmaxFloor;
  m.attr("PEER_OK") = int(PeerState::kOk);
  m.attr("PEER_ABSENT") = int(PeerState::kAbsent);
  m.attr("PEER_TIMED_OUT") = int(PeerState::kTimedOut);
  m.attr("WIRES") = py::dict(py::arg("same") = int(Wire::kSame), py::arg("bf16") = int(Wire::kBf16),
                             py::arg("fp8_e4m3") = int(Wire::kFp8));
  m.attr("SCALE_FORMATS") =
      py::dict(py::arg("float32") = int(ScaleFormat::kFloat32), py::arg("ue8m0") = int(ScaleFormat::kUe8m0));
  m.def("handlers", [] {
    return py::dict(py::arg("dispatch") = Handler(JaxNixlepDispatchCpu),
                    py::arg("redispatch") = Handler(JaxNixlepRedispatchCpu),
                    py::arg("combine") = Handler(JaxNixlepCombineCpu));
  });
  py::class_<SharedMemory, std::shared_ptr<SharedMemory>>(m, "Region", py::buffer_protocol(),
                                                          "Shared memory; a buffer of bytes. Freed with its last user.")
      .def_static(
          "create", [](size_t num_bytes) { return std::make_shared<SharedMemory>(SharedMemory::Create(num_bytes)); },
          py::arg("num_bytes"), Unlocked())
      .def_static(
          "open",
          [](int pid, int fd, size_t num_bytes) {
            return std::make_shared<SharedMemory>(SharedMemory::Open(pid, fd, num_bytes));
          },
          py::arg("pid"), py::arg("fd"), py::arg("num_bytes"), Unlocked(), "OSError: another machine's, or gone.")
      .def_property_readonly("fd", &SharedMemory::fd)
      .def_property_readonly("address",
                             [](const SharedMemory& region) { return reinterpret_cast<uintptr_t>(region.data()); })
      .def_buffer([](SharedMemory& region) {
        return py::buffer_info(reinterpret_cast<uint8_t*>(region.data()), py::ssize_t(region.size()));
      });
  py::class_<RegionAgent>(m, "RegionAgent", "One region, registered with NIXL for one-sided reads.")
      .def(py::init<const std::string&, const std::string&, std::shared_ptr<SharedMemory>>(), py::arg("library"),
           py::arg("name"), py::arg("region"), Unlocked())
      .def("metadata", [](const RegionAgent& agent) { return py::bytes(agent.Metadata()); })
      .def(
          "connect",
          [](RegionAgent& agent, const py::bytes& metadata) {
            std::string blob = metadata;
            py::gil_scoped_release unlocked;
            return agent.Connect(blob);
          },
          py::arg("metadata"))
      .def("read", &RegionAgent::Read, py::arg("peer"), py::arg("pieces"), py::arg("timeout_s"), Unlocked());

  py::register_exception<EpError>(m, "EpError", PyExc_RuntimeError);
  py::register_exception<NixlError>(m, "NixlError", PyExc_RuntimeError);
  py::class_<Endpoint, std::shared_ptr<Endpoint>> endpoint(m, "Endpoint",
                                                           "A rank's end of a group; see ffi/runtime/endpoint.h.");
  endpoint
      .def(py::init(&MakeEndpoint), py::kw_only(), py::arg("rank"), py::arg("max_ranks"), py::arg("experts_per_rank"),
           py::arg("max_tokens"), py::arg("top_k"), py::arg("row_bytes"), py::arg("timeout_s"),
           py::arg("mask_late_peers"))
      .def("address", &Address, "What peers of this machine need to map the region.")
      .def("map_peer", &Endpoint::MapPeer, py::arg("peer"), py::arg("pid"), py::arg("fd"), py::arg("nonce"), Unlocked())
      .def_property_readonly("num_bytes", [](const Endpoint& e) { return e.memory()->size(); })
      .def_property_readonly("dropped_rows", [](const Endpoint& e) { return e.dropped_rows.load(); })
      .def_property_readonly("invalid_ids", [](const Endpoint& e) { return e.invalid_ids.load(); });
  BindEndpoint(endpoint);
  BindElastic(endpoint);
  BindSetEndpoint<Endpoint>(m);
}
