#include "cuda/failures.h"

#include "runtime/endpoint.h"

namespace jax_nixlep::cuda {

std::string Describe(const FailureReport& report, double timeout_s) {
  const std::string what = OpTag::Name(report.tag) + " (operation " +
                           std::to_string(report.stamp & (kTimedOutBit - 1)) + " of epoch " +
                           std::to_string(report.stamp >> kEpochShift) + "): ";
  const std::string who = "rank " + std::to_string(report.peer);
  switch (Failure(report.code)) {
    case Failure::kTimedOut:
      return what + who + " did not arrive within " + std::to_string(timeout_s) +
             " s; check that rank's output, or raise timeout_s if it is only slow";
    case Failure::kOtherOp:
      return what + who + " runs " + OpTag::NameBeside(report.other_tag, report.tag) + " at the same place; " +
             kSameOrder;
    case Failure::kOtherBefore:
      return what + "what " + who + " started before it, " + OpTag::Name(report.other_tag) +
             ", is another operation than here, or had others unfinished; " + kSameOrder;
    case Failure::kPeerAhead:
      return what + who + " went on without this rank, which was too late";
    case Failure::kPeerLeft:
      return what + who + " has left the group";
    case Failure::kPeerFailed:
      return what + who + " failed; see its error";
    case Failure::kBadCount:
      return what + who + " sent a bad count";
    case Failure::kBadHandle:
      return what + "handle must be the one dispatch returned; got rows outside it; pass received.handle unchanged";
    case Failure::kOverwritten:
      return what + who + " went on while its data was read";
    case Failure::kPeerDead:
      return what + who + " is dead; check that rank's output";
    case Failure::kUnreachable:
      return what + who +
             " must be on a GPU that this one reaches, or behind a network card with GPUDirect Async; "
             "got a way that kernels of this build cannot take, or an error on it; see UCX's output, or build with "
             "headers of a UCX that has it";
    case Failure::kInterrupted:
      return what + "the members changed while it waited for " + who;
    case Failure::kNotFinished:
      return what + "an operation must be finished before the second one after it begins; got an unfinished one; " +
             "finish it earlier";
    case Failure::kNotStarted:
      return what +
             "what is finished must be in flight: of this epoch, and finished once; got another; finish it where " +
             "it was started";
    case Failure::kNone:
      break;
  }
  return "";
}

}  // namespace jax_nixlep::cuda
