//! The simulation as its callers meet it: over HTTP, with signed requests.

mod control;
mod faults;
mod mfa;
mod process;
mod refusals;
mod s3;
#[cfg(test)]
mod support;
mod terraform;
