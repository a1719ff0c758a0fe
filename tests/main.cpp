// The test program's main. Catch2 v3 brings its own (-lCatch2Main); v2 makes it here.
#if !__has_include(<catch2/catch_all.hpp>)
#define CATCH_CONFIG_MAIN
#include <catch2/catch.hpp>
#endif
