//! `code`: what the device of the simulated AWS shows, for `cargo dev`.

use std::ffi::OsString;
use std::io::Write;
use std::net::SocketAddr;

use anyhow::Context;
use latchkey_harness::Aws;

/// Prints a code that was not used yet.
pub(crate) async fn run(arguments: Vec<OsString>) -> anyhow::Result<()> {
    let address = arguments.first().and_then(|argument| argument.to_str());
    let address = address.context("name the address that `cargo dev` shows, as 127.0.0.1:PORT")?;
    let bare = address.trim_start_matches("http://").trim_end_matches('/');
    let address: SocketAddr = bare.parse().with_context(|| format!("{bare} is no address"))?;
    let code = Aws::code_at(address).await?;
    writeln!(anstream::stdout(), "{code}").context("failed to print it")
}
