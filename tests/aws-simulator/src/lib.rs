//! A simulated AWS: STS, and as much of S3 as terraform's backend needs.
//!
//! It is strict where AWS is strict: signatures are verified for real, devices show real codes
//! that are good once and within their window, and refusals carry AWS's own words. It exists so
//! that what works here works there, and so that faults AWS shows once a year can be had at will.
//!
//! ```text
//! server     reads, enters in the journal, lets faults strike, answers
//!   ├─ credentials   whose signature is it (sigv4), and may the key still be used
//!   ├─ sts           GetSessionToken, AssumeRole, GetCallerIdentity
//!   │    └─ device   window, single use, nine attempts in three minutes
//!   ├─ s3            objects, for sessions of the roles that a bucket names
//!   └─ control       JSON for harnesses: codes, counts, faults, world, time
//! errors     every refusal's code, status and message, in one table
//! ```
//!
//! In process, a test owns a [`Simulator`]; as a process of its own, see [`cli`]. Not simulated:
//! how IAM policies are evaluated (session policies are checked for form and size only), the
//! seconds it takes a changed device to show in STS, federation, root users.

pub mod cli;
mod clock;
mod control;
mod credentials;
pub mod device;
mod encoding;
mod errors;
mod facts;
mod faults;
mod ids;
mod journal;
mod s3;
mod server;
pub mod sigv4;
mod state;
mod sts;
pub mod totp;
mod world;

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinHandle;

pub use crate::clock::Clock;
pub use crate::control::CodeOfDevice;
pub use crate::facts::Facts;
pub use crate::faults::{Effect, Fault, Service, Stage};
pub use crate::ids::account_of;
pub use crate::journal::{Call, Outcome};
pub use crate::world::{
    AccessKey, Account, Bucket, Device, Invalid, KeyStatus, MfaCondition, Role, Secret, Trust,
    User, World,
};

use crate::state::Shared;

/// Why a simulation does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("build the world")]
    World(#[source] Invalid),
    #[error("listen on {address}")]
    Listen {
        address: SocketAddr,
        #[source]
        source: std::io::Error,
    },
}

/// A running simulation; dropping it stops it.
pub struct Simulator {
    shared: Shared,
    server: JoinHandle<std::io::Result<()>>,
}

impl Simulator {
    /// Starts a simulation on a free port of the loopback address, within the current runtime.
    pub async fn start(world: World, clock: Clock) -> Result<Self, StartError> {
        Self::start_on(SocketAddr::from(([127, 0, 0, 1], 0)), world, clock).await
    }

    /// Starts a simulation on an address of the caller's choice.
    pub async fn start_on(
        address: SocketAddr,
        world: World,
        clock: Clock,
    ) -> Result<Self, StartError> {
        let world = world.complete().map_err(StartError::World)?;
        let listen = |source| StartError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(listen)?;
        let bound = listener.local_addr().map_err(listen)?;
        let shared = Shared::new(world, clock, bound);
        let server = tokio::spawn(server::serve(listener, shared.clone()));
        Ok(Self { shared, server })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.shared.address
    }

    /// The endpoint URL for STS and S3.
    pub fn url(&self) -> String {
        format!("http://{}", self.shared.address)
    }

    /// What there is to begin with: the first user's key, secret and serial, and all roles.
    pub fn facts(&self) -> Facts {
        Facts::of(&self.shared)
    }

    /// The simulation's time, to be moved by a test.
    pub fn clock(&self) -> &Clock {
        &self.shared.clock
    }

    /// Computes the code that a device shows `offset` steps from now.
    pub fn code(&self, serial: &str, offset: i64) -> Option<String> {
        control::code_at(&self.shared, serial, offset).map(|found| found.code)
    }

    /// Finds the oldest code that STS would accept now; with up to five of them in the window, a
    /// test need not wait for the next.
    pub fn unused_code(&self, serial: &str) -> Option<String> {
        control::unused_code(&self.shared, serial).map(|found| found.code)
    }

    /// Says how many attempts a device has left in the current window.
    pub fn attempts_left(&self, serial: &str) -> u32 {
        let now = self.shared.clock.now().as_second();
        self.shared.lock().devices.attempts_left(serial, now)
    }

    /// Counts the requests that carried a code, whatever came of them.
    pub fn requests_with_code(&self, code: &str) -> usize {
        self.shared.lock().journal.with_code(code)
    }

    /// Counts the requests for an action, whatever came of them.
    pub fn requests_for(&self, action: &str) -> usize {
        self.calls().iter().filter(|call| call.action == action).count()
    }

    /// Lists all calls seen, in the order they were read.
    pub fn calls(&self) -> Vec<Call> {
        self.shared.lock().journal.calls().to_vec()
    }

    /// Waits until the calls seen are as `wanted`; on time-out returns the calls as they are.
    pub async fn wait_for_calls(
        &self,
        limit: Duration,
        mut wanted: impl FnMut(&[Call]) -> bool,
    ) -> Result<Vec<Call>, Vec<Call>> {
        let mut changes = self.shared.changes.subscribe();
        // The sender lives as long as `self`, so this ends by the condition or by the limit.
        let reached = changes.wait_for(|_| wanted(self.shared.lock().journal.calls()));
        let in_time = tokio::time::timeout(limit, reached).await.is_ok();
        if in_time { Ok(self.calls()) } else { Err(self.calls()) }
    }

    /// Appends a fault to the script.
    pub fn script(&self, fault: Fault) {
        self.shared.lock().script.push(fault);
    }

    /// Lists the faults that have not struck.
    pub fn waiting_faults(&self) -> Vec<Fault> {
        self.shared.lock().script.waiting()
    }

    /// Changes the world, as an administrator would. Use the world's own methods to add to it:
    /// they make up what is left out.
    pub fn change_world<T>(&self, change: impl FnOnce(&mut World) -> T) -> T {
        change(&mut self.shared.lock().world)
    }

    /// Reads an object, as the owner of the disks would.
    pub fn object(&self, bucket: &str, key: &str) -> Option<Vec<u8>> {
        self.shared.lock().objects.fetch(bucket, key).map(|object| object.body.clone())
    }

    /// Waits until the server has ended; it does so only when it cannot go on.
    async fn ended(&mut self) -> std::io::Result<()> {
        (&mut self.server).await.unwrap_or_else(|error| Err(std::io::Error::other(error)))
    }
}

impl std::fmt::Debug for Simulator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Simulator").field("address", &self.shared.address).finish_non_exhaustive()
    }
}

impl Drop for Simulator {
    fn drop(&mut self) {
        self.shared.stop.cancel();
        self.server.abort();
    }
}
