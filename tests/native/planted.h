// Included before all else, this lets a test make mistakes in the code on purpose: PLANTED(name) is true while
// is_planted, which the test's program defines, says so of the name.
#pragma once

bool is_planted(const char* name);
#define PLANTED(name) is_planted(#name)
