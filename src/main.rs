//! The `forkdisk` command.

fn main() -> std::process::ExitCode {
    forkdisk::cli::main()
}
