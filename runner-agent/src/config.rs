//! Arguments and environment to a configuration that is checked before anything is dialled.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;
use std::{env, fs, io};

use clap::{Args, Parser, Subcommand};
use secrecy::{ExposeSecret, SecretString};
use tonic::transport::Uri;

use crate::Program;
use crate::agent::OnSigterm;
use crate::engine::{self, EngineArguments, EngineSettings};
use crate::job::Phase;
use crate::job_directory::longest_log;
use crate::spool;
use crate::supervisor::confine::{Confinement, Isolation};
use crate::supervisor::environment::may_be_passed;
use crate::supervisor::hooks::{AfterFailure, Hooks};
use crate::supervisor::limits::{Limit, Limits};

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
    Run(Box<Run>),
    /// Supervises one job; the agent starts it.
    #[command(hide = true)]
    Supervise { directory: PathBuf },
    /// Tries what a job must not get; the agent starts it.
    #[command(hide = true)]
    Probe { directory: PathBuf },
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
    #[command(flatten)]
    engines: EngineArguments,
    /// Where provider packages are kept for the next `init`; in the work directory by default,
    /// where jobs can read but not write it.
    #[arg(long, env = "LATCHKEY_RUNNER_PROVIDER_CACHE", value_name = "DIR")]
    provider_cache: Option<PathBuf>,
    /// How many bytes they may take: beyond that, those that no job uses go, the longest unused
    /// first. 0 is no bound.
    #[arg(long, env = "LATCHKEY_RUNNER_PROVIDER_CACHE_LIMIT", default_value_t = 10 << 30,
          value_name = "BYTES")]
    provider_cache_limit: u64,
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
    /// How many bytes the jobs of this host may keep until they are sent; when that is reached,
    /// their logs are cut and no job is taken. States are never dropped.
    #[arg(long, env = "LATCHKEY_RUNNER_SPOOL_LIMIT", default_value_t = 4 << 30,
          value_parser = clap::value_parser!(u64).range(1 << 20..), value_name = "BYTES")]
    spool_limit: u64,
    /// How many bytes of the disk are left free; the same happens below it.
    #[arg(long, env = "LATCHKEY_RUNNER_LOW_WATER", default_value_t = 256 << 20,
          value_name = "BYTES")]
    low_water: u64,
    /// What environments can ask of a runner of the pool; may be repeated.
    #[arg(long, env = "LATCHKEY_RUNNER_LABELS", value_name = "KEY=VALUE", value_delimiter = ',')]
    label: Vec<String>,
    /// Takes jobs of this phase only.
    #[arg(long, env = "LATCHKEY_RUNNER_ACCEPT", value_name = "PHASE")]
    accept: Option<Accept>,
    /// What the first SIGTERM or SIGINT means: finish what runs and take nothing new, or leave
    /// at once while jobs go on without the agent, until the next start takes them up. A second
    /// one cancels the jobs, a third one leaves.
    #[arg(long, env = "LATCHKEY_RUNNER_ON_SIGTERM", value_enum, default_value = "drain")]
    on_sigterm: OnSigterm,
    /// Exits when it has had no job for so long, as 10m or 1h30m.
    #[arg(long, env = "LATCHKEY_RUNNER_IDLE_TIMEOUT", value_name = "DURATION",
          value_parser = duration)]
    idle_timeout: Option<Duration>,
    /// A limit of every process of a job: nofile, nproc or as, like nofile=4096,as=16g.
    #[arg(
        long,
        env = "LATCHKEY_RUNNER_JOB_LIMIT",
        value_name = "NAME=VALUE",
        value_delimiter = ','
    )]
    job_limit: Vec<Limit>,
    /// What to do when the host lacks a part of what keeps jobs apart.
    #[arg(long, env = "LATCHKEY_RUNNER_ISOLATION", value_enum, default_value = "best-effort")]
    isolation: Isolation,
    /// A directory with the programs before-init, after-init, before-plan, after-plan,
    /// before-apply and after-apply, as far as they are wanted.
    #[arg(long, env = "LATCHKEY_RUNNER_HOOKS", value_name = "DIR")]
    hooks: Option<PathBuf>,
    /// How long one of them may take.
    #[arg(long, env = "LATCHKEY_RUNNER_HOOK_TIMEOUT", value_name = "DURATION",
          value_parser = duration, default_value = "5m")]
    hook_timeout: Duration,
    /// What it means when one after a step fails. One before a step always fails the phase.
    #[arg(long, env = "LATCHKEY_RUNNER_HOOK_FAILURE", value_enum, default_value = "after=warn")]
    hook_failure: AfterFailure,
    /// Exits after one job.
    #[arg(long)]
    once: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Accept {
    Plan,
    Apply,
}

/// As many as a control plane takes.
const MOST_LABELS: usize = 16;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("use --control-plane: it must be https://host:port")]
    ControlPlane,
    #[error("use --name: it must have 1 to 63 characters")]
    Name,
    #[error("use --pass-env {0}: jobs must not get it from the host")]
    PassEnv(String),
    #[error(
        "use --label {0}: it must be KEY=VALUE, each 1 to 63 of a-z, A-Z, 0-9, '-', '_', '.', '/'"
    )]
    Label(String),
    #[error("use --label: at most {MOST_LABELS}, each key once")]
    Labels,
    #[error("read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("use --hooks {0}: it is no directory")]
    Hooks(PathBuf),
    #[error("use --work-dir: it lies in {0}, which jobs can read")]
    WorkDir(PathBuf),
    #[error("use the pool token: it must look like lkp_SECRET.FINGERPRINT")]
    PoolToken,
    #[error("find {0} in the present directory")]
    Absolute(PathBuf, #[source] io::Error),
    #[error(transparent)]
    Engines(#[from] engine::ArgumentError),
}

#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) control_plane: Uri,
    pub(crate) host: String,
    pub(crate) work_dir: PathBuf,
    pub(crate) pool_token: Option<PoolToken>,
    pub(crate) name: String,
    pub(crate) slots: u32,
    pub(crate) engines: EngineSettings,
    pub(crate) provider_cache: PathBuf,
    /// 0 for none.
    pub(crate) provider_cache_limit: u64,
    pub(crate) pass_env: Vec<String>,
    pub(crate) terraform_cli_config: Option<PathBuf>,
    pub(crate) longest_log: u64,
    pub(crate) spool: spool::Limits,
    pub(crate) labels: BTreeMap<String, String>,
    /// The only phase it takes; `None` for both.
    pub(crate) accepts: Option<Phase>,
    pub(crate) on_sigterm: OnSigterm,
    pub(crate) idle_timeout: Option<Duration>,
    pub(crate) confinement: Confinement,
    pub(crate) hooks: Hooks,
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
        let work_dir = absolute(run.work_dir)?;
        let provider_cache = run.provider_cache.unwrap_or_else(|| work_dir.join("providers"));
        let hooks = run.hooks.map(absolute).transpose()?;
        if let Some(missing) = hooks.as_ref().filter(|directory| !directory.is_dir()) {
            return Err(Error::Hooks(missing.clone()));
        }
        let hooks = Hooks { directory: hooks, timeout: run.hook_timeout, after: run.hook_failure };
        let provider_cache = absolute(provider_cache)?;
        let terraform_cli_config = run.terraform_cli_config.map(absolute).transpose()?;
        let mut engines = run.engines.check(&work_dir)?;
        let shared = [&engines.cache, &provider_cache].into_iter().chain(&hooks.directory);
        if let Some(outer) = shared.into_iter().find(|shared| work_dir.starts_with(shared)) {
            return Err(Error::WorkDir(outer.clone()));
        }
        let mut readable = engines.places();
        readable.extend([provider_cache.clone(), program.exe.clone()]);
        readable.extend(hooks.directory.clone());
        readable.extend(terraform_cli_config.clone());
        let confinement = Confinement {
            isolation: run.isolation,
            limits: Limits::with(&run.job_limit),
            hidden: Some(work_dir.clone()),
            readable,
            writable: Vec::new(),
        };
        engines.confinement = confinement.clone();
        Ok(Self {
            confinement,
            hooks,
            control_plane,
            host,
            engines,
            provider_cache,
            provider_cache_limit: run.provider_cache_limit,
            work_dir,
            pool_token,
            name,
            slots: run.slots,
            pass_env: run.pass_env,
            terraform_cli_config,
            longest_log: run.longest_log,
            spool: spool::Limits { spool: run.spool_limit, low_water: run.low_water },
            labels: labels(&run.label)?,
            accepts: run.accept.map(|accept| match accept {
                Accept::Plan => Phase::Plan,
                Accept::Apply => Phase::Apply,
            }),
            on_sigterm: run.on_sigterm,
            idle_timeout: run.idle_timeout,
            lifetime: if run.once { Lifetime::OneJob } else { Lifetime::UntilStopped },
            program,
        })
    }
}

fn labels(arguments: &[String]) -> Result<BTreeMap<String, String>, Error> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/');
    let good = |text: &str| (1..=63).contains(&text.len()) && text.chars().all(plain);
    let mut labels = BTreeMap::new();
    for argument in arguments {
        match argument.split_once('=') {
            Some((key, value)) if good(key) && good(value) => {
                if labels.insert(key.to_owned(), value.to_owned()).is_some() {
                    return Err(Error::Labels);
                }
            }
            Some(_) | None => return Err(Error::Label(argument.clone())),
        }
    }
    if labels.len() > MOST_LABELS {
        return Err(Error::Labels);
    }
    Ok(labels)
}

fn duration(text: &str) -> Result<Duration, String> {
    let parsed = text.parse::<jiff::SignedDuration>().map_err(|error| error.to_string())?;
    match Duration::try_from(parsed) {
        Ok(duration) if duration >= Duration::from_secs(1) => Ok(duration),
        Ok(_) | Err(_) => Err("it must be a second or more".into()),
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
        match (Config::check(*run, program), expect) {
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
        check(&[url[0], url[1], "--engine-cache", "/tmp/w/x"], Ok(()));
        check(&[url[0], url[1], "--engine-cache", "/tmp"], Err("which jobs can read"));
        check(&[url[0], url[1], "--name", ""], Err("--name"));
        check(&[url[0], url[1], "--label", "zone=eu-1", "--label", "os=linux"], Ok(()));
        check(&[url[0], url[1], "--label", "zone"], Err("KEY=VALUE"));
        check(&[url[0], url[1], "--label", "zone="], Err("KEY=VALUE"));
        check(&[url[0], url[1], "--label", &format!("a={}", "x".repeat(64))], Err("KEY=VALUE"));
        check(&[url[0], url[1], "--label", "a=1", "--label", "a=2"], Err("each key once"));
        let many: Vec<String> = (0..17).map(|n| format!("--label=k{n}=v")).collect();
        let many = url.iter().copied().chain(many.iter().map(String::as_str)).collect::<Vec<_>>();
        check(&many, Err("at most 16"));
    }

    #[test]
    fn a_duration_is_read_as_people_write_it() {
        for (text, expect) in [("90s", 90), ("10m", 600), ("1h30m", 5400)] {
            assert_eq!(duration(text), Ok(Duration::from_secs(expect)), "{text}");
        }
        for bad in ["", "0s", "-5m", "5", "soon"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
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
