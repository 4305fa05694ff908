//! Arguments and environment to a configuration that is checked before anything is dialled.

use std::path::PathBuf;
use std::{env, fs, io};

use clap::{Args, Parser, Subcommand};
use secrecy::{ExposeSecret, SecretString};
use tonic::transport::Uri;

use crate::Program;
use crate::job_directory::longest_log;
use crate::supervisor::environment::may_be_passed;

/// Runs Terraform jobs of a Latchkey control plane on this host.
#[derive(Debug, Parser)]
#[command(name = "latchkey-runner", version)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Connects to the control plane and runs its jobs.
    Run(Run),
    /// Supervises one job; the agent starts it.
    #[command(hide = true)]
    Supervise { directory: PathBuf },
}

#[derive(Debug, Args)]
pub(crate) struct Run {
    /// The runners' listener of the control plane, as https://host:port.
    #[arg(long, env = "LATCHKEY_RUNNER_CONTROL_PLANE", value_name = "URL")]
    control_plane: String,
    /// Where the runner keeps its identity and its jobs.
    #[arg(long, env = "LATCHKEY_RUNNER_WORK_DIR", value_name = "DIR")]
    work_dir: PathBuf,
    /// A file with a pool token; needed once, until the runner has its certificate.
    #[arg(long, env = "LATCHKEY_RUNNER_POOL_TOKEN_FILE", value_name = "FILE")]
    pool_token_file: Option<PathBuf>,
    /// What people see; the host's name by default.
    #[arg(long, env = "LATCHKEY_RUNNER_NAME")]
    name: Option<String>,
    /// Concurrent jobs.
    #[arg(long, env = "LATCHKEY_RUNNER_SLOTS", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=256))]
    slots: u32,
    /// The terraform (or tofu) to run; looked for on PATH by default.
    #[arg(long, env = "LATCHKEY_RUNNER_TERRAFORM", value_name = "PATH")]
    terraform: Option<PathBuf>,
    /// An environment variable of the runner that jobs get too; may be repeated.
    #[arg(long, env = "LATCHKEY_RUNNER_PASS_ENV", value_name = "NAME", value_delimiter = ',')]
    pass_env: Vec<String>,
    /// The terraform CLI configuration for jobs (mirrors, registries' tokens).
    #[arg(long, env = "LATCHKEY_RUNNER_TERRAFORM_CLI_CONFIG", value_name = "FILE")]
    terraform_cli_config: Option<PathBuf>,
    /// How many bytes of terraform's output a job's log takes; the rest is left out.
    #[arg(long, env = "LATCHKEY_RUNNER_LONGEST_LOG", default_value_t = longest_log(),
          value_parser = clap::value_parser!(u64).range(1 << 20..), value_name = "BYTES")]
    longest_log: u64,
    /// Exits after one job.
    #[arg(long)]
    once: bool,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("use --control-plane: it must be https://host:port")]
    ControlPlane,
    #[error("use --name: it must have 1 to 63 characters")]
    Name,
    #[error("use --pass-env {0}: jobs must not get it from the host")]
    PassEnv(String),
    #[error("read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("use the pool token: it must look like lkp_SECRET.FINGERPRINT")]
    PoolToken,
    #[error("find {0} in the present directory")]
    Absolute(PathBuf, #[source] io::Error),
}

#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) control_plane: Uri,
    pub(crate) host: String,
    pub(crate) work_dir: PathBuf,
    pub(crate) pool_token: Option<PoolToken>,
    pub(crate) name: String,
    pub(crate) slots: u32,
    pub(crate) terraform: Option<PathBuf>,
    pub(crate) pass_env: Vec<String>,
    pub(crate) terraform_cli_config: Option<PathBuf>,
    pub(crate) longest_log: u64,
    pub(crate) lifetime: Lifetime,
    pub(crate) program: Program,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lifetime {
    UntilStopped,
    OneJob,
}

/// `lkp_SECRET.FINGERPRINT`, taken apart.
#[derive(Debug)]
pub(crate) struct PoolToken {
    /// With its prefix, as `Enroll` wants it.
    pub(crate) secret: SecretString,
    /// SHA-256 of the CA certificate's DER.
    pub(crate) fingerprint: [u8; 32],
}

impl PoolToken {
    pub(crate) fn parse(text: &SecretString) -> Result<Self, Error> {
        let text = text.expose_secret().trim();
        let (secret, fingerprint) = text.split_once('.').ok_or(Error::PoolToken)?;
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '=');
        let known = secret.strip_prefix("lkp_").is_some_and(|s| !s.is_empty());
        let fingerprint = hex::decode(fingerprint).ok().and_then(|bytes| bytes.try_into().ok());
        match fingerprint {
            Some(fingerprint) if known && secret.chars().all(plain) => {
                Ok(Self { secret: secret.into(), fingerprint })
            }
            Some(_) | None => Err(Error::PoolToken),
        }
    }
}

impl Config {
    pub(crate) fn check(run: Run, program: Program) -> Result<Self, Error> {
        let control_plane: Uri = run.control_plane.parse().map_err(|_| Error::ControlPlane)?;
        if control_plane.scheme_str() != Some("https") {
            return Err(Error::ControlPlane);
        }
        let host = control_plane.host().ok_or(Error::ControlPlane)?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let name = run.name.unwrap_or_else(host_name);
        if name.is_empty() || name.chars().count() > 63 {
            return Err(Error::Name);
        }
        if let Some(name) = run.pass_env.iter().find(|name| !may_be_passed(name)) {
            return Err(Error::PassEnv(name.clone()));
        }
        let absolute = |path: PathBuf| {
            std::path::absolute(&path).map_err(|source| Error::Absolute(path, source))
        };
        let pool_token = match run.pool_token_file {
            None => None,
            Some(path) => match fs::read_to_string(&path) {
                Ok(text) => Some(PoolToken::parse(&SecretString::from(text))?),
                // The file may be gone once it has done its duty; `enroll` says if it is missed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(source) => return Err(Error::Read { path, source }),
            },
        };
        Ok(Self {
            control_plane,
            host,
            work_dir: absolute(run.work_dir)?,
            pool_token,
            name,
            slots: run.slots,
            terraform: run.terraform.map(absolute).transpose()?,
            pass_env: run.pass_env,
            terraform_cli_config: run.terraform_cli_config.map(absolute).transpose()?,
            longest_log: run.longest_log,
            lifetime: if run.once { Lifetime::OneJob } else { Lifetime::UntilStopped },
            program,
        })
    }
}

fn host_name() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname")
        .ok()
        .or_else(|| env::var("HOSTNAME").ok())
        .map(|name| name.trim().chars().take(63).collect())
        .filter(|name: &String| !name.is_empty())
        .unwrap_or_else(|| "runner".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(more: &[&str], expect: Result<(), &str>) {
        let base = ["latchkey-runner", "run", "--work-dir", "/tmp/w"];
        let arguments = Arguments::try_parse_from(base.iter().chain(more)).unwrap();
        let Command::Run(run) = arguments.command else { panic!("that is `run`") };
        let program = Program { exe: "x".into(), prefix: Vec::new() };
        match (Config::check(run, program), expect) {
            (Ok(_), Ok(())) => {}
            (Err(error), Err(expect)) => assert!(error.to_string().contains(expect), "{error}"),
            (found, _) => panic!("{more:?}: {found:?}"),
        }
    }

    #[test]
    fn arguments_are_checked_before_anything_is_dialled() {
        check(&["--control-plane", "https://127.0.0.1:1"], Ok(()));
        check(&["--control-plane", "https://[::1]:1"], Ok(()));
        check(&["--control-plane", "http://127.0.0.1:1"], Err("https"));
        check(&["--control-plane", "nonsense"], Err("https"));
        let url = ["--control-plane", "https://h:1"];
        check(&[url[0], url[1], "--pass-env", "AWS_PROFILE"], Err("AWS_PROFILE"));
        check(&[url[0], url[1], "--pass-env", "A,B"], Ok(()));
        check(&[url[0], url[1], "--name", ""], Err("--name"));
    }

    #[test]
    fn a_pool_token_is_taken_apart() {
        let fingerprint = "ab".repeat(32);
        let parse = |text: String| PoolToken::parse(&SecretString::from(text));
        let token = parse(format!("lkp_abc-_1.{fingerprint}\n")).unwrap();
        assert_eq!(token.secret.expose_secret(), "lkp_abc-_1");
        assert_eq!(token.fingerprint, [0xab; 32]);
        for bad in ["", "lkp_a", "lkp_.ab", "xyz_a.ab"] {
            assert!(parse(bad.into()).is_err(), "{bad}");
        }
        assert!(parse(format!("xyz_a.{fingerprint}")).is_err());
        assert!(parse("lkp_a.abcd".into()).is_err());
    }
}
