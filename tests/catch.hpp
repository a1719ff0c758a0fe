// Catch2 v2 (Debian 12, Ubuntu 22.04) and v3 (newer) under one include.
#pragma once
#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
#ifdef __CUDACC__
// v3 puts `#pragma nv_diagnostic push` and `pop` around every check. Where these stand in a member
// function defined inside its class, the compiler of CUDA 13.0 (cudafe++) never ends.
#undef CATCH_INTERNAL_START_WARNINGS_SUPPRESSION
#undef CATCH_INTERNAL_STOP_WARNINGS_SUPPRESSION
#undef CATCH_INTERNAL_SUPPRESS_UNUSED_VARIABLE_WARNINGS
#define CATCH_INTERNAL_START_WARNINGS_SUPPRESSION
#define CATCH_INTERNAL_STOP_WARNINGS_SUPPRESSION
#define CATCH_INTERNAL_SUPPRESS_UNUSED_VARIABLE_WARNINGS
#endif
#else
#include <catch2/catch.hpp>
#endif
