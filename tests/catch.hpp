// Catch2 v2 (Debian 12, Ubuntu 22.04) and v3 (newer) under one include.
#pragma once
#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
#else
#include <catch2/catch.hpp>
#endif
