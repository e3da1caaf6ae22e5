//! The client's executable. As `kubectl-virtmark` on the PATH it is `kubectl virtmark`.

use std::process::ExitCode;

fn main() -> ExitCode {
    virtmark::client::main()
}
