// A mapped file whose pages cannot be read (a disk error, a file cut short by someone else) raises
// SIGBUS, which would end the process without a word.
#pragma once

namespace mergeme {

// From now on SIGBUS says on stderr which file could not be read, then ends the process with
// `exit_code`. Does nothing on systems without SIGBUS.
void report_bus_errors(int exit_code);

}  // namespace mergeme
