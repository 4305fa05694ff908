//! `latchkey-aws-simulator`: the simulation as a process of its own.

fn main() -> anyhow::Result<()> {
    latchkey_aws_simulator::cli::run(std::env::args_os())
}
