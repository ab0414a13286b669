//! The `forkdisk` command.
fn main() {}
