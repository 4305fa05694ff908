//! The rules of Latchkey, pure: no async, no input or output, no clock, no randomness, no
//! serialization. The manifest proves it.
//!
//! A run moves by [`run::step`], a function of (run, event, time) that answers with the next run
//! and the effects to perform after it is committed. [`policy`] decides what a phase needs
//! before it may receive credentials, [`lease`] numbers a runner's right to a job.

pub mod device;
pub mod environment;
pub mod id;
pub mod lease;
pub mod policy;
pub mod run;
pub mod time;
pub mod token_code;
