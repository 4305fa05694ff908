//! One type per kind of id, so that none can be passed where another is meant.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Uuid);

        impl $name {
            pub const fn from_uuid(uuid: Uuid) -> Self {
                Self(uuid)
            }

            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(Uuid::from_bytes(bytes))
            }

            pub const fn as_bytes(&self) -> &[u8; 16] {
                self.0.as_bytes()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = Malformed;

            fn from_str(text: &str) -> Result<Self, Malformed> {
                Uuid::try_parse(text).map(Self).map_err(|_| Malformed)
            }
        }
    )*};
}

ids! {
    /// A tenant.
    OrganizationId
    /// A Terraform root with its settings, variables and state.
    EnvironmentId
    /// A run; version 7, so that ids sort by the time they were made.
    RunId
    /// A person or a service token's owner.
    UserId
    /// A program's identity within one organization.
    ServiceTokenId
    /// A named set of runners.
    PoolId
    /// One enrolled agent on a build host.
    RunnerId
    /// One submitted token code and what became of it.
    AuthenticationId
    /// One sign-in with a password; version 7, as run ids are.
    SignInId
    /// A webhook, or an address that gets mail.
    SubscriberId
    /// A notice on its way to one subscriber; version 7, as run ids are.
    DeliveryId
    /// Something that was done by break-glass; version 7, as run ids are.
    GlassId
    /// Something a runner brought that is kept for a person; version 7, as run ids are.
    QuarantinedId
}

/// An id that is not a UUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed id")]
pub struct Malformed;

/// SHA-256 of some content.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

impl FromStr for Digest {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let text = text.as_bytes();
        if text.len() != 64 {
            return Err(Malformed);
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
            let high = (pair[0] as char).to_digit(16).ok_or(Malformed)?;
            let low = (pair[1] as char).to_digit(16).ok_or(Malformed)?;
            *byte = u8::try_from(high << 4 | low).map_err(|_| Malformed)?;
        }
        Ok(Self(bytes))
    }
}

/// The number of a lease: strictly increasing per job, so that a late message of an earlier
/// lease is recognised. Zero means that the job was never leased.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(u64);

impl Epoch {
    pub const NONE: Epoch = Epoch(0);

    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    pub const fn get(self) -> u64 {
        self.0
    }

    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// The number of the control plane's history; a restore from backup starts a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(u64);

impl Generation {
    pub const FIRST: Generation = Generation(1);

    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    pub const fn get(self) -> u64 {
        self.0
    }
}

/// One phase of one run, as a runner executes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId {
    pub run: RunId,
    pub phase: crate::policy::Phase,
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.run, self.phase)
    }
}
