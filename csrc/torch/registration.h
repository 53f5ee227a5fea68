// Registers operators as torch.ops.<RESQ_NAMESPACE>. That is "resq", but for builds that are loaded
// beside others: the emulator's, and those for the Hugging Face hub (tools/hub_kernel.py).
#pragma once

#include <torch/csrc/stable/library.h>

#ifndef RESQ_NAMESPACE
#define RESQ_NAMESPACE resq
#endif

// torch's macros make names of their arguments, which have to be expanded before.
#define RESQ_LIBRARY_EXPANDED(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define RESQ_IMPL_EXPANDED(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)

#define RESQ_LIBRARY(m) RESQ_LIBRARY_EXPANDED(RESQ_NAMESPACE, m)
#define RESQ_IMPL(key, m) RESQ_IMPL_EXPANDED(RESQ_NAMESPACE, key, m)
