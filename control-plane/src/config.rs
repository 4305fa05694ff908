//! Arguments to configuration, checked before anything is opened or bound.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Parser;

/// Keeps Terraform runs, spends MFA codes at AWS, leases jobs to runners.
#[derive(Clone, Debug, Parser)]
#[command(name = "latchkey-control-plane", version)]
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
    /// Seconds that a lease lives without a heartbeat: 1 to 600
    #[arg(long, env = "LATCHKEY_LEASE_TERM", default_value_t = 30)]
    lease_term: u64,
    /// Write the bound addresses to this file, as JSON, once both listeners are open
    #[arg(long)]
    ready_file: Option<PathBuf>,
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
    pub ready_file: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeopleTransport {
    Tls,
    Plaintext,
}

/// Why a configuration cannot be started.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("--insecure-plaintext is for loopback addresses only, and {0} is none; leave it out")]
    PlaintextBeyondLoopback(SocketAddr),
    #[error("--lease-term is 1 to 600 seconds")]
    LeaseTerm,
    #[error("--sts-endpoint is an http:// or https:// URL")]
    StsEndpoint,
    #[error("--key-file must lie outside of --data-dir, or a backup of the data holds its key")]
    KeyWithinData,
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
            ready_file: args.ready_file,
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
        Args::try_parse_from(args).unwrap().try_into()
    }

    #[test]
    fn defaults_are_tls_on_loopback_and_a_key_beside_the_data() {
        let config = config(&[]).unwrap();
        assert_eq!(config.people_transport, PeopleTransport::Tls);
        assert_eq!(config.key_file, PathBuf::from("/data.key"));
    }

    #[test]
    fn what_cannot_be_safe_is_refused() {
        let refused = |args: &[&str]| config(args).unwrap_err();
        let open = ["--insecure-plaintext", "--people-address", "0.0.0.0:4840"];
        assert!(matches!(refused(&open), ConfigError::PlaintextBeyondLoopback(_)));
        assert!(config(&["--insecure-plaintext"]).is_ok());
        assert_eq!(refused(&["--key-file", "/data/key"]), ConfigError::KeyWithinData);
        assert_eq!(refused(&["--lease-term", "0"]), ConfigError::LeaseTerm);
        assert_eq!(refused(&["--sts-endpoint", "sts.local"]), ConfigError::StsEndpoint);
    }
}
