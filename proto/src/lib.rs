//! The wire: generated messages, clients and servers of package `latchkey.v1`.
//!
//! Everyone may depend on this crate; it depends on nothing of this workspace. Messages that
//! carry a secret have a `Debug` that hides it.

pub mod audit;
mod redacted;
pub mod reserved;

/// The generated package.
pub mod v1 {
    #![allow(clippy::all, missing_debug_implementations, unreachable_pub)]
    tonic::include_proto!("latchkey.v1");
}

/// The encoded `FileDescriptorSet` of the package, for reflection and for tests that walk every
/// rpc.
pub const DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptor.bin"));

/// `ErrorInfo.domain` of every refusal.
pub const ERROR_DOMAIN: &str = "latchkey";

impl v1::Reason {
    /// Returns the name as `ErrorInfo.reason` carries it, without the enum's prefix.
    pub fn name(self) -> &'static str {
        self.as_str_name().trim_start_matches("REASON_")
    }
}
