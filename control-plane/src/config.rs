//! Arguments to configuration, checked before anything is opened or bound.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Parser, Subcommand};

use crate::app::organizations::FirstOwner;
use crate::notices;

/// Keeps Terraform runs, spends MFA codes at AWS, leases jobs to runners.
#[derive(Clone, Debug, Parser)]
#[command(name = "latchkey-control-plane", version)]
pub struct Program {
    #[command(subcommand)]
    pub command: Command,
}

/// Without one of these words, the arguments are those of `run`.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Run the control plane; meant when no command is given
    Run(Box<Args>),
    Backup(BackupArgs),
    Restore(RestoreArgs),
    Alarm(AlarmArgs),
    BreakGlass(BreakGlassArgs),
    Organization(OrganizationArgs),
}

impl Program {
    /// Reads arguments, the program's name first; `run` may be left out.
    pub fn read(args: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let mut args: Vec<OsString> = args.into_iter().collect();
        let is_flag_of_run = |first: &OsString| {
            let first = first.to_string_lossy();
            first.starts_with('-') && !["-h", "--help", "-V", "--version"].contains(&first.as_ref())
        };
        // None at all: everything may stand in the environment.
        if args.get(1).is_none_or(is_flag_of_run) {
            args.insert(1.min(args.len()), "run".into());
        }
        Self::try_parse_from(args)
    }
}

/// Copy all that the control plane keeps, while it runs or not
///
/// A backup holds the records as of one moment, the stored files and the logs. What is secret in
/// it stays sealed under the master key, and THE MASTER KEY IS NOT PART OF IT: keep a copy of the
/// key file elsewhere, since a backup is worth nothing without it. Stored files are shared with
/// the data directory by hard links where the file system allows; copy the backup to another
/// machine. A restore tells by the master key whether a backup is one of ours and unchanged.
///
/// Run it as the user that the control plane runs as.
#[derive(Clone, Debug, clap::Args)]
pub struct BackupArgs {
    /// Directory of the control plane's data
    #[arg(long, env = "LATCHKEY_DATA_DIR")]
    pub data_dir: PathBuf,
    /// Directory to make; it must not exist yet
    #[arg(long)]
    pub to: PathBuf,
    /// File with the master key, which is needed where no control plane runs [default: DATA_DIR
    /// with `.key` added]
    #[arg(long, env = "LATCHKEY_KEY_FILE")]
    key_file: Option<PathBuf>,
}

impl BackupArgs {
    pub fn key_file(&self) -> PathBuf {
        self.key_file.clone().unwrap_or_else(|| beside(&self.data_dir))
    }
}

/// Make a data directory out of a backup, in a new generation
///
/// At the first start after it, every run that had not ended is ended with that reason and its
/// environment frozen, approvals and sessions are void, and no token code is spent for three
/// minutes. What was revoked or removed after the backup was taken cannot be known, so:
///
///   - service tokens and pool tokens are void; owners make new ones
///
///   - every runner is drained; `latchkey runner resume` one once you know that it was not revoked
///
///   - everybody's sessions are ended; passwords are those of the backup, also of those who have
///     changed theirs since
///
///   - people's logins and memberships are valid again as of the backup, or nobody could do any of
///     this: they are printed, look at each
///
/// Run it as the user that the control plane runs as. The data directory may be a mount point.
#[derive(Clone, Debug, clap::Args)]
pub struct RestoreArgs {
    /// Directory of the backup
    #[arg(long)]
    pub from: PathBuf,
    /// Directory to fill; it must be empty or not exist
    #[arg(long, env = "LATCHKEY_DATA_DIR")]
    pub data_dir: PathBuf,
    /// File with the master key that belonged to the backup [default: DATA_DIR with `.key` added].
    /// It is not part of a backup
    #[arg(long, env = "LATCHKEY_KEY_FILE")]
    key_file: Option<PathBuf>,
    /// Make the new generation higher than this one. For when an alarm names a generation that
    /// runners have seen: one that was made while the clock was ahead
    #[arg(long, value_name = "GENERATION")]
    pub above: Option<u64>,
}

/// Show whether a runner proved that the data are an old copy
///
/// Asks the control plane that runs on the data. The remedy is a restore, or, where these are the
/// newest data that are left, a backup of them and its restore: a new generation.
#[derive(Clone, Debug, clap::Args)]
pub struct AlarmArgs {
    /// Directory of the control plane's data
    #[arg(long, env = "LATCHKEY_DATA_DIR")]
    pub data_dir: PathBuf,
    /// Take the alarm back: jobs are granted again, until the next runner proves it
    #[arg(long)]
    pub clear: bool,
}

/// Lower a policy, or clear keys and device, without a code: for a lost device
///
/// Asks the control plane that runs on the data, as the user that it runs as. It is audited as the
/// actor `host`, told to every webhook and recipient of mail of the organization, and shown with
/// every environment that it touches until an owner sets the policy again with a code. Runs that are queued carry the policy they were queued under: queue them
/// again.
#[derive(Clone, Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("glass").required(true))]
pub struct BreakGlassArgs {
    /// Name of the organization
    pub organization: String,
    /// Name of the environment; all of the organization's when left out
    #[arg(conflicts_with = "clear_triple")]
    pub environment: Option<String>,
    /// Directory of the control plane's data
    #[arg(long, env = "LATCHKEY_DATA_DIR")]
    pub data_dir: PathBuf,
    /// Why; kept in the audit trail and shown with the environments
    #[arg(long)]
    pub reason: String,
    /// Level to set; plan rule and second person are taken away. A stricter level is never lowered
    /// by less than asked for, nor a weaker one raised
    #[arg(long, value_enum, group = "glass")]
    pub policy: Option<BrokenPolicy>,
    /// Delete the organization's access key, secret key and MFA serial
    #[arg(long, group = "glass")]
    pub clear_triple: bool,
    /// Delete this person's own instead
    #[arg(long, value_name = "NAME", requires = "clear_triple")]
    pub user: Option<String>,
}

/// The levels that break-glass sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum BrokenPolicy {
    Never,
    AppliesOnly,
}

/// Make another organization
///
/// Asks the control plane that runs on the data. The first organization is made by `latchkey login
/// --bootstrap`; further ones are made here, by whoever commands the host.
#[derive(Clone, Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("first owner").required(true))]
pub struct OrganizationArgs {
    /// Lower-case letters, digits and `-`
    pub name: String,
    /// Directory of the control plane's data
    #[arg(long, env = "LATCHKEY_DATA_DIR")]
    pub data_dir: PathBuf,
    /// A user of this control plane who is to own it
    #[arg(long, value_name = "USER", group = "first owner")]
    owner: Option<String>,
    /// A user to make, who is to own it; their token is printed once
    #[arg(long, value_name = "USER", group = "first owner")]
    new_owner: Option<String>,
}

impl OrganizationArgs {
    pub fn first_owner(&self) -> FirstOwner {
        match (&self.owner, &self.new_owner) {
            (Some(owner), _) => FirstOwner::Existing(owner.clone()),
            (None, owner) => FirstOwner::New(owner.clone().unwrap_or_default()),
        }
    }
}

impl RestoreArgs {
    pub fn key_file(&self) -> PathBuf {
        self.key_file.clone().unwrap_or_else(|| beside(&self.data_dir))
    }
}

#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Directory of all data; made at the first start
    #[arg(long, env = "LATCHKEY_DATA_DIR")]
    data_dir: PathBuf,
    /// File with the master key, made at the first start [default: DATA_DIR with `.key` added].
    /// Keep it apart from backups of the data
    #[arg(long, env = "LATCHKEY_KEY_FILE")]
    key_file: Option<PathBuf>,
    /// Where people and programs connect
    #[arg(long, env = "LATCHKEY_PEOPLE_ADDRESS", default_value = "127.0.0.1:4840")]
    people_address: SocketAddr,
    /// Where runners connect
    #[arg(long, env = "LATCHKEY_RUNNERS_ADDRESS", default_value = "127.0.0.1:4841")]
    runners_address: SocketAddr,
    /// Name or address that clients know this host by, for its certificate; may be repeated
    #[arg(long = "name", env = "LATCHKEY_NAMES", value_delimiter = ',')]
    names: Vec<String>,
    /// Serve people without TLS; allowed on loopback only
    #[arg(long)]
    insecure_plaintext: bool,
    /// STS to use instead of the region's own
    #[arg(long, env = "LATCHKEY_STS_ENDPOINT")]
    sts_endpoint: Option<String>,
    /// Use AWS's FIPS endpoints
    #[arg(long, env = "LATCHKEY_USE_FIPS")]
    use_fips: bool,
    /// Seconds that a lease lives without a heartbeat: 1 to 600. A job whose runner is gone is
    /// granted again, or its apply marked as lost, at most a tenth later: with 30, in 33 seconds
    #[arg(long, env = "LATCHKEY_LEASE_TERM", default_value_t = 30)]
    lease_term: u64,
    /// Seconds that terraform has after a graceful cancel before an owner may kill it: 0 to 3600
    #[arg(long, env = "LATCHKEY_FORCE_CANCEL_GRACE", default_value_t = 30)]
    force_cancel_grace: u64,
    /// Seconds that a runner's stream of logs or artifacts may bring no whole message: 1 to 3600.
    /// It is ended then, and its runner goes on from what was acknowledged
    #[arg(long, env = "LATCHKEY_STREAM_PATIENCE", default_value_t = 60)]
    stream_patience: u64,
    /// Write the bound addresses to this file, as JSON, once both listeners are open
    #[arg(long)]
    ready_file: Option<PathBuf>,
    #[command(flatten, next_help_heading = "Notices")]
    notices: notices::options::Args,
}

/// A configuration that can be started.
#[derive(Clone, Debug)]
pub struct Config {
    pub data_dir: PathBuf,
    pub key_file: PathBuf,
    pub people_address: SocketAddr,
    pub runners_address: SocketAddr,
    pub names: Vec<String>,
    pub people_transport: PeopleTransport,
    pub sts_endpoint: Option<String>,
    pub use_fips: bool,
    pub lease_term: Duration,
    pub force_cancel_grace: Duration,
    pub stream_patience: Duration,
    pub ready_file: Option<PathBuf>,
    pub notices: notices::options::Options,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeopleTransport {
    Tls,
    Plaintext,
}

/// Why a configuration cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("--insecure-plaintext is for loopback addresses only, and {0} is none; leave it out")]
    PlaintextBeyondLoopback(SocketAddr),
    #[error("--lease-term is 1 to 600 seconds")]
    LeaseTerm,
    #[error("--force-cancel-grace is 0 to 3600 seconds")]
    ForceCancelGrace,
    #[error("--stream-patience is 1 to 3600 seconds")]
    StreamPatience,
    #[error("--sts-endpoint is an http:// or https:// URL")]
    StsEndpoint,
    #[error("--key-file must lie outside of --data-dir, or a backup of the data holds its key")]
    KeyWithinData,
    #[error(transparent)]
    Notices(#[from] notices::options::Error),
}

impl TryFrom<Args> for Config {
    type Error = ConfigError;

    fn try_from(args: Args) -> Result<Self, ConfigError> {
        let people_transport = match args.insecure_plaintext {
            true if !args.people_address.ip().is_loopback() => {
                return Err(ConfigError::PlaintextBeyondLoopback(args.people_address));
            }
            true => PeopleTransport::Plaintext,
            false => PeopleTransport::Tls,
        };
        if !(1..=600).contains(&args.lease_term) {
            return Err(ConfigError::LeaseTerm);
        }
        if args.force_cancel_grace > 3600 {
            return Err(ConfigError::ForceCancelGrace);
        }
        if !(1..=3600).contains(&args.stream_patience) {
            return Err(ConfigError::StreamPatience);
        }
        let is_url = |url: &String| url.starts_with("http://") || url.starts_with("https://");
        if !args.sts_endpoint.as_ref().is_none_or(is_url) {
            return Err(ConfigError::StsEndpoint);
        }
        let key_file = args.key_file.unwrap_or_else(|| beside(&args.data_dir));
        if key_file.starts_with(&args.data_dir) {
            return Err(ConfigError::KeyWithinData);
        }
        let mut names = args.names;
        names.extend(["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()]);
        Ok(Self {
            data_dir: args.data_dir,
            key_file,
            people_address: args.people_address,
            runners_address: args.runners_address,
            names,
            people_transport,
            sts_endpoint: args.sts_endpoint,
            use_fips: args.use_fips,
            lease_term: Duration::from_secs(args.lease_term),
            force_cancel_grace: Duration::from_secs(args.force_cancel_grace),
            stream_patience: Duration::from_secs(args.stream_patience),
            ready_file: args.ready_file,
            notices: args.notices.try_into()?,
        })
    }
}

fn beside(data_dir: &Path) -> PathBuf {
    let mut name = data_dir.as_os_str().to_owned();
    name.push(".key");
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(args: &[&str]) -> Result<Config, ConfigError> {
        let args = ["latchkey-control-plane", "--data-dir", "/data"].iter().chain(args);
        match Program::read(args.map(OsString::from)).unwrap().command {
            Command::Run(args) => (*args).try_into(),
            other @ (Command::Backup(_)
            | Command::Restore(_)
            | Command::Alarm(_)
            | Command::BreakGlass(_)
            | Command::Organization(_)) => panic!("{other:?}"),
        }
    }

    #[test]
    fn run_is_meant_when_no_command_is_given() {
        let read = |line: &str| {
            Program::read(line.split(' ').map(OsString::from)).map(|program| program.command)
        };
        assert!(matches!(read("lcp --data-dir /d").unwrap(), Command::Run(_)));
        assert!(matches!(read("lcp run --data-dir /d").unwrap(), Command::Run(_)));
        let backup = read("lcp backup --data-dir /d --to /b").unwrap();
        assert!(matches!(backup, Command::Backup(args) if args.to == Path::new("/b")));
        let restore = read("lcp restore --from /b --data-dir /d").unwrap();
        assert!(matches!(restore, Command::Restore(args)
            if args.key_file() == Path::new("/d.key")));
        let alarm = read("lcp alarm --data-dir /d --clear").unwrap();
        assert!(matches!(alarm, Command::Alarm(args) if args.clear));
        let broken = read("lcp break-glass acme web --data-dir /d --reason lost --policy never");
        assert!(matches!(broken.unwrap(), Command::BreakGlass(args)
            if args.policy == Some(BrokenPolicy::Never) && args.environment.is_some()));
        let cleared = "lcp break-glass acme --data-dir /d --reason lost --clear-triple";
        assert!(read(&format!("{cleared} --user ada")).is_ok());
        // One of the two, and never both.
        assert!(read("lcp break-glass acme --data-dir /d --reason lost").is_err());
        assert!(read(&format!("{cleared} --policy never")).is_err());
        assert!(read("lcp break-glass acme web --data-dir /d --reason x --clear-triple").is_err());
        let owned = |line: &str| match read(line).unwrap() {
            Command::Organization(args) => (args.name.clone(), args.first_owner()),
            other => panic!("{other:?}"),
        };
        assert_eq!(
            owned("lcp organization web --data-dir /d --owner ada"),
            ("web".into(), FirstOwner::Existing("ada".into()))
        );
        assert_eq!(
            owned("lcp organization web --data-dir /d --new-owner bob").1,
            FirstOwner::New("bob".into())
        );
        assert!(read("lcp organization web --data-dir /d").is_err());
        assert!(read("lcp organization web --data-dir /d --owner a --new-owner b").is_err());
        let help = read("lcp backup --help").unwrap_err().to_string();
        assert!(help.contains("MASTER KEY IS NOT PART"), "{help}");
        assert!(read("lcp --help").unwrap_err().to_string().contains("restore"));
    }

    #[test]
    fn defaults_are_tls_on_loopback_and_a_key_beside_the_data() {
        let config = config(&[]).unwrap();
        assert_eq!(config.people_transport, PeopleTransport::Tls);
        assert_eq!(config.key_file, PathBuf::from("/data.key"));
        // With the tenth that it takes to see it, a silent runner is found out within 45 s.
        assert_eq!(config.lease_term, Duration::from_secs(30));
    }

    #[test]
    fn what_cannot_be_safe_is_refused() {
        let refused = |args: &[&str]| config(args).unwrap_err();
        let open = ["--insecure-plaintext", "--people-address", "0.0.0.0:4840"];
        assert!(matches!(refused(&open), ConfigError::PlaintextBeyondLoopback(_)));
        assert!(config(&["--insecure-plaintext"]).is_ok());
        assert!(matches!(refused(&["--key-file", "/data/key"]), ConfigError::KeyWithinData));
        assert!(matches!(refused(&["--lease-term", "0"]), ConfigError::LeaseTerm));
        let forever = ["--force-cancel-grace", "3601"];
        assert!(matches!(refused(&forever), ConfigError::ForceCancelGrace));
        assert!(matches!(refused(&["--stream-patience", "0"]), ConfigError::StreamPatience));
        assert!(matches!(refused(&["--sts-endpoint", "sts.local"]), ConfigError::StsEndpoint));
    }
}
