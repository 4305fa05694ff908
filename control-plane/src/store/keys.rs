//! Every key of the store, built here and nowhere else.
//!
//! A key is a kind byte, then parts of fixed width (ids, big-endian numbers, digests), then at
//! most one part of variable length, last. So keys of a kind sort by their parts, and no two
//! different lists of parts make the same key. Run ids are UUIDs of version 7: the order of
//! keys is the order in which runs were made, and a descending scan shows the newest first.
//!
//! Kind bytes are on disk: a number is never given to another kind. `0x00` belongs to the
//! adapters, for what they need to know about themselves.

use std::fmt;
use std::sync::Arc;

use latchkey_domain::id::{
    AuthenticationId, DeliveryId, Digest, EnvironmentId, Epoch, Generation, GlassId,
    OrganizationId, PoolId, QuarantinedId, RunId, RunnerId, ServiceTokenId, SignInId, SubscriberId,
    UserId,
};
use latchkey_domain::policy::Phase;
use uuid::Uuid;

/// The name of one record. Shared, since the writer tells it on.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(Arc<[u8]>);

/// The common beginning of the keys that a scan or a watch is about.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Prefix(Vec<u8>);

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $byte:literal)*) => {
        /// What a record is about.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum Kind {
            $($(#[$doc])* $name = $byte,)*
        }

        impl Kind {
            pub const ALL: &[Kind] = &[$(Kind::$name),*];

            fn from_byte(byte: u8) -> Option<Kind> {
                match byte {
                    $($byte => Some(Kind::$name),)*
                    _ => None,
                }
            }
        }
    };
}

kinds! {
    Generation = 0x01
    Setting = 0x02
    Incarnation = 0x03
    User = 0x10
    UserByName = 0x11
    Token = 0x12
    Request = 0x13
    SignIn = 0x14
    Password = 0x15
    Organization = 0x20
    OrganizationByName = 0x21
    Membership = 0x22
    MembershipByUser = 0x23
    ServiceToken = 0x24
    Environment = 0x28
    EnvironmentByName = 0x29
    Configuration = 0x2a
    StateVersion = 0x2b
    Variable = 0x2c
    /// Changed with each variable of a scope, so that its budget holds.
    VariableStamp = 0x2d
    ApplyDurations = 0x2e
    Run = 0x30
    RunByEnvironment = 0x31
    RunByOrganization = 0x32
    OpenRun = 0x33
    Session = 0x34
    Quarantine = 0x35
    PendingRun = 0x36
    Artifact = 0x37
    Garbage = 0x38
    Quarantined = 0x39
    QuarantineTally = 0x3a
    QuarantineQuota = 0x3b
    BlobUse = 0x3c
    QuarantineTotal = 0x3d
    Authentication = 0x40
    AuthenticationOpen = 0x41
    Device = 0x42
    /// The attempt of a change that may be open.
    ChangeOpen = 0x43
    Pool = 0x50
    PoolByName = 0x51
    PoolToken = 0x52
    Runner = 0x53
    RunnerByKey = 0x54
    RunnerByPool = 0x55
    /// Written by the committer alone, from the drafts of a batch.
    Audit = 0x60
    /// Written by the committer alone.
    AuditHead = 0x61
    Subscriptions = 0x70
    Outbox = 0x71
    Delivered = 0x72
    BrokenGlass = 0x73
    /// Up to which of them an owner has acknowledged.
    GlassSeen = 0x74
}

/// Whose variable it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VariableScope {
    Organization(OrganizationId),
    Environment(OrganizationId, EnvironmentId),
    /// A person's own variables within an organization.
    Personal(OrganizationId, UserId),
    /// Variables given for one run.
    Run(RunId),
}

impl Key {
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Returns what the record is about; `None` for the adapters' own keys.
    pub fn kind(&self) -> Option<Kind> {
        self.0.first().copied().and_then(Kind::from_byte)
    }

    /// Returns the last 16 bytes: the id that an index entry points to, where the key ends
    /// with one (`RunByEnvironment`, `RunByOrganization`, `OpenRun`, `Run`, `Membership`,
    /// `MembershipByUser`, `RunnerByPool`, `AuthenticationOpen`, ...).
    pub fn last_id(&self) -> Option<[u8; 16]> {
        self.0.get(1..)?.last_chunk().copied()
    }

    /// Returns the first 16 bytes after the kind: the id of what the record belongs to.
    pub fn first_id(&self) -> Option<[u8; 16]> {
        self.0.get(1..)?.first_chunk().copied()
    }

    /// Returns the name at the end of a `*ByName` or `Variable` key.
    pub fn name(&self) -> Option<&str> {
        let fixed = match self.kind()? {
            Kind::UserByName | Kind::OrganizationByName | Kind::Setting => 0,
            Kind::EnvironmentByName | Kind::PoolByName | Kind::Request => 16,
            Kind::Variable => match self.0.get(1)? {
                b'o' | b'r' => 17,
                b'e' | b'p' => 33,
                _ => return None,
            },
            Kind::Generation
            | Kind::Incarnation
            | Kind::User
            | Kind::Token
            | Kind::SignIn
            | Kind::Password
            | Kind::Organization
            | Kind::Membership
            | Kind::MembershipByUser
            | Kind::ServiceToken
            | Kind::Environment
            | Kind::Configuration
            | Kind::StateVersion
            | Kind::VariableStamp
            | Kind::Run
            | Kind::RunByEnvironment
            | Kind::RunByOrganization
            | Kind::OpenRun
            | Kind::Session
            | Kind::Quarantine
            | Kind::ApplyDurations
            | Kind::PendingRun
            | Kind::Artifact
            | Kind::Garbage
            | Kind::Quarantined
            | Kind::QuarantineTally
            | Kind::QuarantineQuota
            | Kind::BlobUse
            | Kind::QuarantineTotal
            | Kind::Authentication
            | Kind::AuthenticationOpen
            | Kind::Device
            | Kind::ChangeOpen
            | Kind::Pool
            | Kind::PoolToken
            | Kind::Runner
            | Kind::RunnerByKey
            | Kind::RunnerByPool
            | Kind::Audit
            | Kind::AuditHead
            | Kind::Subscriptions
            | Kind::Outbox
            | Kind::Delivered
            | Kind::BrokenGlass
            | Kind::GlassSeen => return None,
        };
        std::str::from_utf8(self.0.get(1 + fixed..)?).ok()
    }

    /// Takes a key as an adapter or a backup found it.
    pub(crate) fn from_stored(bytes: impl Into<Arc<[u8]>>) -> Self {
        Self(bytes.into())
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({self})")
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind() {
            Some(kind) => write!(f, "{kind:?} {}", hex::encode(&self.0[1..])),
            None => f.write_str(&hex::encode(&self.0)),
        }
    }
}

impl Prefix {
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub fn covers(&self, key: &Key) -> bool {
        key.0.starts_with(&self.0)
    }

    /// Returns the first key after all that the prefix covers; `None` if there is no such key.
    pub(super) fn end(&self) -> Option<Vec<u8>> {
        let mut end = self.0.clone();
        while let Some(last) = end.pop() {
            if last < 0xff {
                end.push(last + 1);
                return Some(end);
            }
        }
        None
    }
}

impl fmt::Debug for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Prefix({})", Key(self.0.as_slice().into()))
    }
}

fn join(kind: Kind, parts: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(1 + parts.iter().map(|part| part.len()).sum::<usize>());
    bytes.push(kind as u8);
    parts.iter().for_each(|part| bytes.extend_from_slice(part));
    bytes
}

fn key(kind: Kind, parts: &[&[u8]]) -> Key {
    Key(join(kind, parts).into())
}

fn prefix(kind: Kind, parts: &[&[u8]]) -> Prefix {
    Prefix(join(kind, parts))
}

fn phase_byte(phase: Phase) -> [u8; 1] {
    match phase {
        Phase::Plan => [0],
        Phase::Apply => [1],
    }
}

/// Covers one record alone, where no other key begins with it.
pub fn exactly(key: &Key) -> Prefix {
    Prefix(key.0.to_vec())
}

/// Covers all records of a kind.
pub fn all(kind: Kind) -> Prefix {
    prefix(kind, &[])
}

// The instance

pub fn generation() -> Key {
    key(Kind::Generation, &[])
}

/// A start of a control plane, by the last commit before it.
pub fn incarnation(begins: u64) -> Key {
    key(Kind::Incarnation, &[&begins.to_be_bytes()])
}

pub fn setting(name: &str) -> Key {
    key(Kind::Setting, &[name.as_bytes()])
}

// Who calls

pub fn user(user: UserId) -> Key {
    key(Kind::User, &[user.as_bytes()])
}

pub fn user_by_name(name: &str) -> Key {
    key(Kind::UserByName, &[name.as_bytes()])
}

/// The login or service token with this digest.
pub fn token(digest: &[u8; 32]) -> Key {
    key(Kind::Token, &[digest])
}

/// A session that a person has open, other than the AWS session of a run.
pub fn sign_in(user: UserId, sign_in: SignInId) -> Key {
    key(Kind::SignIn, &[user.as_bytes(), sign_in.as_bytes()])
}

pub fn sign_ins_of(user: UserId) -> Prefix {
    prefix(Kind::SignIn, &[user.as_bytes()])
}

pub fn password(user: UserId) -> Key {
    key(Kind::Password, &[user.as_bytes()])
}

/// The recorded answer to a create or a submission, by the caller's `request_id`.
pub fn request(user: UserId, request_id: &str) -> Key {
    key(Kind::Request, &[user.as_bytes(), request_id.as_bytes()])
}

// Tenants

pub fn organization(organization: OrganizationId) -> Key {
    key(Kind::Organization, &[organization.as_bytes()])
}

pub fn organization_by_name(name: &str) -> Key {
    key(Kind::OrganizationByName, &[name.as_bytes()])
}

pub fn membership(organization: OrganizationId, user: UserId) -> Key {
    key(Kind::Membership, &[organization.as_bytes(), user.as_bytes()])
}

pub fn memberships_of(organization: OrganizationId) -> Prefix {
    prefix(Kind::Membership, &[organization.as_bytes()])
}

pub fn membership_by_user(user: UserId, organization: OrganizationId) -> Key {
    key(Kind::MembershipByUser, &[user.as_bytes(), organization.as_bytes()])
}

pub fn memberships_by_user(user: UserId) -> Prefix {
    prefix(Kind::MembershipByUser, &[user.as_bytes()])
}

pub fn service_token(organization: OrganizationId, token: ServiceTokenId) -> Key {
    key(Kind::ServiceToken, &[organization.as_bytes(), token.as_bytes()])
}

pub fn service_tokens_of(organization: OrganizationId) -> Prefix {
    prefix(Kind::ServiceToken, &[organization.as_bytes()])
}

pub fn environment(organization: OrganizationId, environment: EnvironmentId) -> Key {
    key(Kind::Environment, &[organization.as_bytes(), environment.as_bytes()])
}

pub fn environments_of(organization: OrganizationId) -> Prefix {
    prefix(Kind::Environment, &[organization.as_bytes()])
}

pub fn environment_by_name(organization: OrganizationId, name: &str) -> Key {
    key(Kind::EnvironmentByName, &[organization.as_bytes(), name.as_bytes()])
}

/// Covers the names of an organization's environments, in the order of names.
pub fn environments_by_name(organization: OrganizationId) -> Prefix {
    prefix(Kind::EnvironmentByName, &[organization.as_bytes()])
}

pub fn configuration(organization: OrganizationId, digest: &Digest) -> Key {
    key(Kind::Configuration, &[organization.as_bytes(), digest.as_bytes()])
}

pub fn state_version(environment: EnvironmentId, number: u64) -> Key {
    key(Kind::StateVersion, &[environment.as_bytes(), &number.to_be_bytes()])
}

/// Returns the number at the end of a [`state_version`] key.
pub fn number_of_state_version(key: &Key) -> Option<u64> {
    key.0.get(17..)?.try_into().ok().map(u64::from_be_bytes)
}

pub fn state_versions_of(environment: EnvironmentId) -> Prefix {
    prefix(Kind::StateVersion, &[environment.as_bytes()])
}

pub fn variable(scope: VariableScope, name: &str) -> Key {
    let mut bytes = variables_of(scope).0;
    bytes.extend_from_slice(name.as_bytes());
    Key(bytes.into())
}

/// Variables that were fixed for runs, of all runs.
pub fn variables_of_runs() -> Prefix {
    prefix(Kind::Variable, &[b"r"])
}

/// Returns the run of a key under [`variables_of_runs`].
pub fn run_of_variable(key: &Key) -> Option<RunId> {
    key.0.get(2..)?.first_chunk::<16>().map(|bytes| RunId::from_bytes(*bytes))
}

pub fn variables_of(scope: VariableScope) -> Prefix {
    of_scope(Kind::Variable, scope)
}

/// What every change in a scope writes.
pub fn variable_stamp(scope: VariableScope) -> Key {
    Key(of_scope(Kind::VariableStamp, scope).0.into())
}

fn of_scope(kind: Kind, scope: VariableScope) -> Prefix {
    match scope {
        VariableScope::Organization(organization) => prefix(kind, &[b"o", organization.as_bytes()]),
        VariableScope::Environment(organization, environment) => {
            prefix(kind, &[b"e", organization.as_bytes(), environment.as_bytes()])
        }
        VariableScope::Personal(organization, user) => {
            prefix(kind, &[b"p", organization.as_bytes(), user.as_bytes()])
        }
        VariableScope::Run(run) => prefix(kind, &[b"r", run.as_bytes()]),
    }
}

// Runs

pub fn run(run: RunId) -> Key {
    key(Kind::Run, &[run.as_bytes()])
}

pub fn run_by_environment(environment: EnvironmentId, run: RunId) -> Key {
    key(Kind::RunByEnvironment, &[environment.as_bytes(), run.as_bytes()])
}

pub fn runs_by_environment(environment: EnvironmentId) -> Prefix {
    prefix(Kind::RunByEnvironment, &[environment.as_bytes()])
}

pub fn run_by_organization(organization: OrganizationId, run: RunId) -> Key {
    key(Kind::RunByOrganization, &[organization.as_bytes(), run.as_bytes()])
}

pub fn runs_by_organization(organization: OrganizationId) -> Prefix {
    prefix(Kind::RunByOrganization, &[organization.as_bytes()])
}

/// A run that has not ended; what a control plane rebuilds its dispatch from.
pub fn open_run(run: RunId) -> Key {
    key(Kind::OpenRun, &[run.as_bytes()])
}

pub fn open_runs() -> Prefix {
    all(Kind::OpenRun)
}

/// A run that waits for its turn in an environment.
pub fn pending_run(environment: EnvironmentId, run: RunId) -> Key {
    key(Kind::PendingRun, &[environment.as_bytes(), run.as_bytes()])
}

pub fn pending_runs_of(environment: EnvironmentId) -> Prefix {
    prefix(Kind::PendingRun, &[environment.as_bytes()])
}

/// What a lease has uploaded of a kind.
pub fn artifact(run: RunId, phase: Phase, epoch: Epoch, kind: u8) -> Key {
    let parts =
        [run.as_bytes().as_slice(), &phase_byte(phase), &epoch.get().to_be_bytes(), &[kind]];
    key(Kind::Artifact, &parts)
}

/// What the leases of a run have uploaded.
pub fn artifacts_of(run: RunId) -> Prefix {
    prefix(Kind::Artifact, &[run.as_bytes()])
}

/// A blob that nothing needs any more and that is about to be deleted.
pub fn garbage(organization: OrganizationId, digest: &Digest) -> Key {
    key(Kind::Garbage, &[organization.as_bytes(), digest.as_bytes()])
}

/// Returns the organization and digest of a [`garbage`] key.
pub fn read_garbage(key: &Key) -> Option<(OrganizationId, Digest)> {
    let (organization, digest) = key.0.get(1..)?.split_first_chunk::<16>()?;
    let digest = digest.try_into().ok()?;
    Some((OrganizationId::from_bytes(*organization), Digest::from_bytes(digest)))
}

/// The sealed session credentials that wait for a phase.
pub fn session(run: RunId, phase: Phase) -> Key {
    key(Kind::Session, &[run.as_bytes(), &phase_byte(phase)])
}

/// How long the last applies of an environment took.
pub fn apply_durations(environment: EnvironmentId) -> Key {
    key(Kind::ApplyDurations, &[environment.as_bytes()])
}

/// What somebody still needs a blob for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlobUser {
    /// A state version of the environment.
    State(EnvironmentId),
    /// What a job of the run made.
    Made(RunId),
    Quarantined(QuarantinedId),
    /// The value of a variable; those of one run are of what it made.
    Value(Uuid),
    /// An upload that is not settled yet.
    Upload(Uuid),
}

pub fn blob_use(organization: OrganizationId, digest: &Digest, user: BlobUser) -> Key {
    let (tag, id) = match user {
        BlobUser::State(environment) => (b"s", *environment.as_bytes()),
        BlobUser::Made(run) => (b"m", *run.as_bytes()),
        BlobUser::Quarantined(id) => (b"q", *id.as_bytes()),
        BlobUser::Value(id) => (b"v", *id.as_bytes()),
        BlobUser::Upload(id) => (b"u", *id.as_bytes()),
    };
    key(Kind::BlobUse, &[organization.as_bytes(), digest.as_bytes(), tag, &id])
}

pub fn blob_uses(organization: OrganizationId, digest: &Digest) -> Prefix {
    prefix(Kind::BlobUse, &[organization.as_bytes(), digest.as_bytes()])
}

/// Returns the user of a [`blob_use`] key.
pub fn read_blob_user(key: &Key) -> Option<BlobUser> {
    let id = key.last_id()?;
    match key.0.get(1 + 16 + 32)? {
        b's' => Some(BlobUser::State(EnvironmentId::from_bytes(id))),
        b'm' => Some(BlobUser::Made(RunId::from_bytes(id))),
        b'q' => Some(BlobUser::Quarantined(QuarantinedId::from_bytes(id))),
        b'v' => Some(BlobUser::Value(Uuid::from_bytes(id))),
        b'u' => Some(BlobUser::Upload(Uuid::from_bytes(id))),
        _ => None,
    }
}

// Notices

/// Whom an organization tells what.
pub fn subscriptions(organization: OrganizationId) -> Key {
    key(Kind::Subscriptions, &[organization.as_bytes()])
}

/// A notice on its way.
pub fn outbox(organization: OrganizationId, subscriber: SubscriberId, delivery: DeliveryId) -> Key {
    key(Kind::Outbox, &[organization.as_bytes(), subscriber.as_bytes(), delivery.as_bytes()])
}

pub fn outbox_of(organization: OrganizationId, subscriber: SubscriberId) -> Prefix {
    prefix(Kind::Outbox, &[organization.as_bytes(), subscriber.as_bytes()])
}

/// Returns the organization, subscriber and delivery of an [`outbox`] key.
pub fn read_outbox(key: &Key) -> Option<(OrganizationId, SubscriberId, DeliveryId)> {
    let (organization, rest) = key.0.get(1..)?.split_first_chunk::<16>()?;
    let (subscriber, rest) = rest.split_first_chunk::<16>()?;
    let delivery = rest.try_into().ok()?;
    Some((
        OrganizationId::from_bytes(*organization),
        SubscriberId::from_bytes(*subscriber),
        DeliveryId::from_bytes(delivery),
    ))
}

/// How a notice's way ended.
pub fn delivered(
    organization: OrganizationId,
    subscriber: SubscriberId,
    delivery: DeliveryId,
) -> Key {
    key(Kind::Delivered, &[organization.as_bytes(), subscriber.as_bytes(), delivery.as_bytes()])
}

pub fn delivered_of(organization: OrganizationId, subscriber: SubscriberId) -> Prefix {
    prefix(Kind::Delivered, &[organization.as_bytes(), subscriber.as_bytes()])
}

pub fn broken_glass(organization: OrganizationId, glass: GlassId) -> Key {
    key(Kind::BrokenGlass, &[organization.as_bytes(), glass.as_bytes()])
}

pub fn broken_glass_of(organization: OrganizationId) -> Prefix {
    prefix(Kind::BrokenGlass, &[organization.as_bytes()])
}

pub fn glass_seen(organization: OrganizationId, user: UserId) -> Key {
    key(Kind::GlassSeen, &[organization.as_bytes(), user.as_bytes()])
}

// Quarantine

/// What names one thing that a lease may bring back: the newest is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuarantineSlot {
    pub organization: OrganizationId,
    pub run: RunId,
    pub phase: Phase,
    pub epoch: Epoch,
    pub generation: Generation,
    pub runner: RunnerId,
    pub kind: u8,
}

/// Which record has what a lease brought back.
pub fn quarantine(slot: QuarantineSlot) -> Key {
    let QuarantineSlot { organization, run, phase, epoch, generation, runner, kind } = slot;
    key(
        Kind::Quarantine,
        &[
            organization.as_bytes(),
            run.as_bytes(),
            &phase_byte(phase),
            &epoch.get().to_be_bytes(),
            &generation.get().to_be_bytes(),
            runner.as_bytes(),
            &[kind],
        ],
    )
}

pub fn quarantine_of(organization: OrganizationId, run: RunId) -> Prefix {
    prefix(Kind::Quarantine, &[organization.as_bytes(), run.as_bytes()])
}

pub fn quarantine_of_phase(organization: OrganizationId, run: RunId, phase: Phase) -> Prefix {
    prefix(Kind::Quarantine, &[organization.as_bytes(), run.as_bytes(), &phase_byte(phase)])
}

/// What is kept for a person.
pub fn quarantined(organization: OrganizationId, id: QuarantinedId) -> Key {
    key(Kind::Quarantined, &[organization.as_bytes(), id.as_bytes()])
}

pub fn quarantined_of(organization: OrganizationId) -> Prefix {
    prefix(Kind::Quarantined, &[organization.as_bytes()])
}

/// How much of a run is in quarantine, of what those brought who were seen to hold it.
pub fn quarantine_tally(organization: OrganizationId, run: RunId) -> Key {
    key(Kind::QuarantineTally, &[organization.as_bytes(), run.as_bytes()])
}

/// How much of a run is in quarantine on one runner's word alone.
pub fn quarantine_tally_on_word(organization: OrganizationId, run: RunId, runner: RunnerId) -> Key {
    let parts = [organization.as_bytes().as_slice(), run.as_bytes(), runner.as_bytes()];
    key(Kind::QuarantineTally, &parts)
}

/// How much of an organization is in quarantine, of one sort of witness; of all its runners
/// together, or of one.
pub fn quarantine_total(
    organization: OrganizationId,
    witness: u8,
    runner: Option<RunnerId>,
) -> Key {
    let runner = runner.as_ref().map_or([].as_slice(), |runner| runner.as_bytes());
    key(Kind::QuarantineTotal, &[organization.as_bytes(), &[witness], runner])
}

/// Of which runs a runner has brought things that it was never seen to hold.
pub fn quarantine_quota(runner: RunnerId) -> Key {
    key(Kind::QuarantineQuota, &[runner.as_bytes()])
}

// Authentications

pub fn authentication(run: RunId, authentication: AuthenticationId) -> Key {
    key(Kind::Authentication, &[run.as_bytes(), authentication.as_bytes()])
}

pub fn authentications_of(run: RunId) -> Prefix {
    prefix(Kind::Authentication, &[run.as_bytes()])
}

/// An attempt without an outcome; at start each becomes *unknown*.
pub fn authentication_open(authentication: AuthenticationId) -> Key {
    key(Kind::AuthenticationOpen, &[authentication.as_bytes()])
}

pub fn authentications_open() -> Prefix {
    all(Kind::AuthenticationOpen)
}

/// A change whose code is being spent.
pub fn change_open(authentication: AuthenticationId) -> Key {
    key(Kind::ChangeOpen, &[authentication.as_bytes()])
}

/// The attempts of one MFA device, over all organizations: AWS counts per device, not per
/// tenant. `device` names the account and the serial.
pub fn device(device: &str) -> Key {
    key(Kind::Device, &[device.as_bytes()])
}

// Runners

pub fn pool(organization: OrganizationId, pool: PoolId) -> Key {
    key(Kind::Pool, &[organization.as_bytes(), pool.as_bytes()])
}

pub fn pools_of(organization: OrganizationId) -> Prefix {
    prefix(Kind::Pool, &[organization.as_bytes()])
}

pub fn pool_by_name(organization: OrganizationId, name: &str) -> Key {
    key(Kind::PoolByName, &[organization.as_bytes(), name.as_bytes()])
}

pub fn pools_by_name(organization: OrganizationId) -> Prefix {
    prefix(Kind::PoolByName, &[organization.as_bytes()])
}

pub fn pool_token(digest: &[u8; 32]) -> Key {
    key(Kind::PoolToken, &[digest])
}

pub fn runner(runner: RunnerId) -> Key {
    key(Kind::Runner, &[runner.as_bytes()])
}

/// The runner whose certificate has this fingerprint of its public key.
pub fn runner_by_key(fingerprint: &[u8; 32]) -> Key {
    key(Kind::RunnerByKey, &[fingerprint])
}

pub fn runner_by_pool(pool: PoolId, runner: RunnerId) -> Key {
    key(Kind::RunnerByPool, &[pool.as_bytes(), runner.as_bytes()])
}

pub fn runners_by_pool(pool: PoolId) -> Prefix {
    prefix(Kind::RunnerByPool, &[pool.as_bytes()])
}

// Audit

pub fn audit(organization: OrganizationId, sequence: u64) -> Key {
    key(Kind::Audit, &[organization.as_bytes(), &sequence.to_be_bytes()])
}

/// Returns the number of the audit record that has this key.
pub fn audit_number(key: &Key) -> Option<u64> {
    let number = key.as_bytes().get(17..)?.try_into().ok()?;
    (key.kind() == Some(Kind::Audit)).then(|| u64::from_be_bytes(number))
}

pub fn audit_of(organization: OrganizationId) -> Prefix {
    prefix(Kind::Audit, &[organization.as_bytes()])
}

pub fn audit_head(organization: OrganizationId) -> Key {
    key(Kind::AuditHead, &[organization.as_bytes()])
}

#[cfg(test)]
mod tests;
