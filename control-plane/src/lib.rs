//! The control plane: keeps runs, decides on codes, leases jobs to runners.
//!
//! ```text
//! grpc, http       parse, ask, translate; decide nothing
//!   │
//! app              one use case per file; takes a Caller; authorization first
//!   │
//! domain (crate)   run lifecycle, policy, leases: pure
//!   │
//! ports            store, blobs, run_log, sts, clock
//!   │
//! adapters         store::sled, files, sts::aws
//! ```
//!
//! `runtime` alone knows every part; nothing depends on it, on `grpc` or on `http`.

pub mod app;
pub mod audit;
pub mod auth;
pub mod authority;
pub mod backup;
pub mod blobs;
pub mod blocking;
pub mod clock;
pub mod config;
pub mod dispatch;
mod durable;
pub mod error;
pub mod grpc;
pub mod http;
pub mod job;
mod listener;
pub mod notices;
pub mod reaper;
pub mod run_log;
pub mod runtime;
pub mod seal;
mod seldom;
pub mod store;
pub mod sts;

pub use self::runtime::run;
