#include "re2_shim.h"

#include <cstdio>
#include <exception>
#include <memory>

#include <re2/re2.h>

namespace {
constexpr size_t kPatternMax = 4096;
constexpr int kProgramMax = 8192;
constexpr int64_t kMemory = 1 << 20;
}  // namespace

extern "C" void *narrows_re2_compile(const char *pattern, size_t size, char *error, size_t error_size) {
    try {
        if (size > kPatternMax) {
            std::snprintf(error, error_size, "pattern of %zu bytes, at most %zu", size, kPatternMax);
            return nullptr;
        }
        RE2::Options options;
        options.set_log_errors(false);
        options.set_max_mem(kMemory);
        auto program = std::make_unique<RE2>(re2::StringPiece(pattern, size), options);
        if (!program->ok()) {
            std::snprintf(error, error_size, "%s", program->error().c_str());
            return nullptr;
        }
        if (program->ProgramSize() > kProgramMax) {
            std::snprintf(error, error_size, "program of %d instructions, at most %d", program->ProgramSize(), kProgramMax);
            return nullptr;
        }
        return program.release();
    } catch (const std::exception &failure) {
        std::snprintf(error, error_size, "%s", failure.what());
        return nullptr;
    }
}

extern "C" int narrows_re2_match(const void *program, const char *data, size_t size) {
    try {
        return RE2::FullMatch(re2::StringPiece(data, size), *static_cast<const RE2 *>(program));
    } catch (const std::exception &) {
        return 0; /* out of memory: as if it did not match */
    }
}

extern "C" void narrows_re2_free(void *program) { delete static_cast<RE2 *>(program); }
