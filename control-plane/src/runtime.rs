//! Puts the parts together, starts them in order and stops them. The only file that knows all.
//!
//! Order of a start: the database first, so that a second process on the same data stops before
//! it can do anything; then attempts without an outcome are settled; then listeners open, and
//! only then do the terms of standing leases begin.

use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use latchkey_domain::id::Generation;
use secrecy::ExposeSecret;
use tokio::net::{TcpListener, TcpSocket};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing_subscriber::EnvFilter;

use crate::app::App;
use crate::app::break_glass::{Broken, Glass, Level};
use crate::app::lease_job::SESSION_FLOOR;
use crate::app::uploads::Uploads;
use crate::authority::Authority;
use crate::blobs::Blobs;
use crate::clock::{Clock, Wall};
use crate::config::{
    AlarmArgs, BackupArgs, BreakGlassArgs, BrokenPolicy, Command, Config, OrganizationArgs,
    PeopleTransport, Program, RestoreArgs,
};
use crate::dispatch::Leases;
use crate::durable;
use crate::listener::{self, Security};
use crate::notices::{self, Outbound};
use crate::run_log::{self, RunLogs};
use crate::seal::{IfMissing, MasterKey};
use crate::store::record::encode;
use crate::store::sled::{self, Sled};
use crate::store::{Batch, CommitError, Expect, Store, keys};
use crate::sts::aws::AwsSts;
use crate::{backup, dispatch, grpc, http, reaper};

/// How long open requests may take to end once the process was told to stop.
const DRAIN: Duration = Duration::from_secs(5);

/// Connections that may wait to be accepted; the kernel caps it by `somaxconn`.
const BACKLOG: u32 = 4096;

/// Runs the control plane until a signal stops it.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let command = match Program::read(args) {
        Ok(program) => program.command,
        Err(error) => error.exit(),
    };
    let filter = EnvFilter::try_from_env("LATCHKEY_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(colour)
        .with_writer(std::io::stderr)
        .init();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let done = runtime.context("start the runtime").and_then(|runtime| {
        let done = match command {
            Command::Run(args) => {
                Config::try_from(*args).map_err(Into::into).and_then(|c| runtime.block_on(serve(c)))
            }
            Command::Backup(args) => runtime.block_on(back_up(&args)),
            Command::Restore(args) => runtime.block_on(bring_back(&args)),
            Command::Alarm(args) => alarm(&args),
            Command::BreakGlass(args) => break_glass(args),
            Command::Organization(args) => organization(&args),
        };
        // A backup under way is thrown away: it must not hold up a stop.
        runtime.shutdown_timeout(DRAIN);
        done
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "latchkey-control-plane: failed to {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(config: Config) -> anyhow::Result<()> {
    rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("install the crypto provider: another is installed"))?;
    let (app, inbox) = open(&config).await?;
    app.begin_incarnation().await.context("begin an incarnation of the data")?;
    app.recall_alarm().await.context("recall whether the data are an old copy")?;
    app.settle_restore().await.context("settle what a restore left open")?;
    app.settle_authentications().await.context("settle attempts that a stop left open")?;
    app.settle_changes().await.context("settle changes that a stop left open")?;
    if let Some(secret) = app.prepare_bootstrap().await.context("prepare the first sign-in")? {
        writeln!(
            std::io::stdout(),
            "One-time secret for `latchkey login --bootstrap`: {}",
            secret.expose_secret()
        )
        .context("print the one-time secret")?;
    }

    let people = bind(config.people_address)
        .with_context(|| format!("listen for people on {}", config.people_address))?;
    let runners = bind(config.runners_address)
        .with_context(|| format!("listen for runners on {}", config.runners_address))?;
    let (people_address, runners_address) = (people.local_addr()?, runners.local_addr()?);

    let leases: Arc<dyn Leases> = Arc::clone(&app) as Arc<dyn Leases>;
    let dispatching = tokio::spawn(inbox.run(leases, config.lease_term));
    app.give_all_turns().await.context("give turns")?;
    app.collect_garbage().await.context("delete what nothing needs")?;
    // Last, since from here on the terms of standing leases run.
    app.reconcile().await.context("resume open runs")?;
    let reaping = tokio::spawn(reaper::run(Arc::clone(&app)));
    app.note_all_limits().await.context("find the limits of open runs")?;
    let limiting = tokio::spawn(Arc::clone(&app).keep_limits());
    let telling = tokio::spawn(notices::worker::run(Arc::clone(&app)));

    let host =
        backup::socket::listen(&config.data_dir).context("listen for the host's commands")?;
    let commands =
        tokio::spawn(backup::socket::serve(host, Arc::clone(&app), config.data_dir.clone()));

    let (stop, stopped) = watch::channel(());
    let serving = tokio::spawn(listen(Arc::clone(&app), config.clone(), people, runners, stopped));
    if let Some(path) = &config.ready_file {
        let ready = serde_json::json!({
            "people": people_address.to_string(),
            "runners": runners_address.to_string(),
            "ca_file": config.data_dir.join("authority").join("ca.pem"),
        });
        durable::replace(path, ready.to_string().as_bytes()).context("write the ready file")?;
    }
    tracing::info!(people = %people_address, runners = %runners_address, "ready");

    let mut serving = serving;
    let outcome = tokio::select! {
        () = told_to_stop() => {
            tracing::info!("stopping");
            drop(stop);
            // Streams of people and runners have no end of their own: they are cut, and resumed
            // by their callers.
            let _ = tokio::time::timeout(DRAIN, &mut serving).await;
            Ok(())
        }
        reason = app.store.failed() => {
            tracing::error!(%reason, "the store has failed; what is durable is safe");
            Err(anyhow::anyhow!("use the store: {reason}; start again to recover"))
        }
        ended = &mut serving => ended.context("serve")?,
    };
    serving.abort();
    commands.abort();
    reaping.abort();
    limiting.abort();
    telling.abort();
    dispatching.abort();
    outcome
}

/// Takes a backup: by the control plane that has the data open, or here if none runs.
async fn back_up(args: &BackupArgs) -> anyhow::Result<()> {
    let to = std::path::absolute(&args.to).context("find the directory of the backup")?;
    let data = std::path::absolute(&args.data_dir).context("find the data directory")?;
    let options = sled::Options::new(data.join("store"));
    anyhow::ensure!(
        sled::exists(&options.directory),
        "find the data of a control plane in {}",
        data.display()
    );
    let manifest = match backup::socket::ask_backup(&data, &to)? {
        Some(manifest) => manifest,
        None => {
            check_owner(&data)?;
            let key_file = args.key_file();
            let master = MasterKey::open(&key_file, IfMissing::Refuse)?;
            // Under another key it would be a backup that no restore takes.
            Authority::open(&data.join("authority"), &master, Arc::new(Wall))?;
            let store = Sled::open(&options)?;
            let logs = RunLogs::open(run_log::Options::new(data.join("logs")))
                .context("open the logs of runs")?;
            let source = backup::Source {
                data_dir: &data,
                store: &store,
                logs: &logs,
                blobs: None,
                master: &master,
            };
            backup::take(source, &to, Wall.now()).await?
        }
    };
    writeln!(
        std::io::stdout(),
        "Backup of generation {} at commit {} in {}: {} records, {} files, {} bytes. The master \
         key is not in it.",
        manifest.generation,
        manifest.version,
        to.display(),
        manifest.records.count,
        manifest.files.count,
        manifest.records.bytes + manifest.files.bytes,
    )
    .context("print what was done")
}

/// Makes a data directory out of a backup.
async fn bring_back(args: &RestoreArgs) -> anyhow::Result<()> {
    let plan = backup::Plan {
        from: &args.from,
        data_dir: &args.data_dir,
        key_file: &args.key_file(),
        above: args.above.map(Generation::new),
    };
    let restored = backup::restore(plan, Arc::new(Wall)).await?;
    tell(&restored, &args.data_dir, &mut std::io::stdout().lock()).context("print what was done")
}

/// Says what a restore did, and who has to be looked at.
fn tell(restored: &backup::Restored, data_dir: &Path, to: &mut impl Write) -> std::io::Result<()> {
    let backup::Restored { manifest, generation, returned } = restored;
    let time = &manifest.time;
    writeln!(
        to,
        "Restored {} records and {} files of {time} into {}, in generation {}. At the first \
         start, runs that had not ended are ended and their environments frozen.",
        manifest.records.count,
        manifest.files.count,
        data_dir.display(),
        generation.get(),
    )?;
    let mut list = |head: String, names: Vec<String>| {
        if names.is_empty() {
            return Ok(());
        }
        writeln!(to, "\n{head}")?;
        names.iter().try_for_each(|name| writeln!(to, "  {name}"))
    };
    list(
        format!(
            "The logins of these people are valid, also of those who were removed or replaced \
             after {time}:"
        ),
        returned.people.iter().map(ToString::to_string).collect(),
    )?;
    list(
        "These runners are drained. Resume one (`latchkey runner resume`) once you know that it \
         was not revoked since:"
            .into(),
        returned.runners.iter().map(ToString::to_string).collect(),
    )?;
    list(
        "These service tokens are void, like all pool tokens. Make new ones:".into(),
        returned.service_tokens.iter().map(ToString::to_string).collect(),
    )
}

/// Shows or clears the alarm of the control plane that runs.
fn alarm(args: &AlarmArgs) -> anyhow::Result<()> {
    let data = std::path::absolute(&args.data_dir).context("find the data directory")?;
    let found = backup::socket::ask_alarm(&data, args.clear)?;
    let found = found.with_context(|| {
        format!("find a control plane that runs on {}; start it first", data.display())
    })?;
    let mut out = std::io::stdout().lock();
    match (found, args.clear) {
        (None, _) => writeln!(out, "No alarm."),
        (Some(proof), false) => writeln!(
            out,
            "The data are an old copy, {proof}. Nothing is granted until they are restored."
        ),
        (Some(proof), true) => writeln!(out, "Taken back: the data are an old copy, {proof}."),
    }
    .context("print the alarm")
}

/// Has the control plane that runs break the glass.
fn break_glass(args: BreakGlassArgs) -> anyhow::Result<()> {
    let data = std::path::absolute(&args.data_dir).context("find the data directory")?;
    let BreakGlassArgs { organization, environment, reason, policy, user, .. } = args;
    let glass = match policy {
        Some(policy) => {
            let level = match policy {
                BrokenPolicy::Never => Level::Never,
                BrokenPolicy::AppliesOnly => Level::AppliesOnly,
            };
            Glass::Policy { environment, level }
        }
        None => Glass::Triple { user },
    };
    let broken = backup::socket::ask_break_glass(&data, organization, glass, reason)?;
    let Broken { done, told } = broken.with_context(|| {
        format!("find a control plane that runs on {}; start it first", data.display())
    })?;
    let told = match (done.is_empty(), told) {
        (true, _) => "Nothing had to be done.".to_owned(),
        (false, 0) => "Nobody is told: the organization has neither a webhook nor a recipient of \
                       mail. Tell its owners."
            .to_owned(),
        (false, told) => format!("Told: {told} of its webhooks and recipients of mail."),
    };
    let mut out = std::io::stdout().lock();
    done.iter()
        .try_for_each(|done| writeln!(out, "Done: {done}."))
        .and_then(|()| writeln!(out, "{told}"))
        .context("print what was done")
}

/// Has the control plane that runs make an organization.
fn organization(args: &OrganizationArgs) -> anyhow::Result<()> {
    let data = std::path::absolute(&args.data_dir).context("find the data directory")?;
    let made = backup::socket::ask_organization(&data, args.name.clone(), args.first_owner())?;
    let token = made.with_context(|| {
        format!("find a control plane that runs on {}; start it first", data.display())
    })?;
    let mut out = std::io::stdout().lock();
    match token {
        None => writeln!(out, "Made the organization {}.", args.name),
        Some(token) => writeln!(
            out,
            "Made the organization {}. Its owner signs in with this token, which is shown once: {}",
            args.name,
            token.expose_secret()
        ),
    }
    .context("print what was done")
}

/// Refuses to make files that the control plane's own user could not use.
fn check_owner(data: &Path) -> anyhow::Result<()> {
    let owner = durable::owner_if_another(data).context("read the data directory")?;
    match owner {
        None => Ok(()),
        Some(owner) => anyhow::bail!(
            "use the data in {}: they belong to the user {owner}, who could not use what another \
             one makes among them; run this as that user, or start the control plane first",
            data.display()
        ),
    }
}

/// Opens all that is on disk, and makes the use cases that stand on it.
async fn open(config: &Config) -> anyhow::Result<(Arc<App>, dispatch::Inbox)> {
    let data = &config.data_dir;
    durable::create_private_directory(data).context("make the data directory")?;
    let options = sled::Options::new(data.join("store"));
    refuse_in_part(data)?;
    let missing = match sled::exists(&options.directory) {
        true => IfMissing::Refuse,
        false => IfMissing::Create,
    };
    let master = Arc::new(MasterKey::open(&config.key_file, missing)?);
    let store: Arc<dyn Store> = Arc::new(Sled::open(&options)?);
    let clock: Arc<dyn Clock> = Arc::new(Wall);
    let blobs = Blobs::open(data.join("blobs"), Arc::clone(&master)).context("open the blobs")?;
    let logs =
        RunLogs::open(run_log::Options::new(data.join("logs"))).context("open the logs of runs")?;
    // Last: that it is there says that all others were made.
    let authority = Authority::open(&data.join("authority"), &master, Arc::clone(&clock))?;
    let generation = generation(&*store).await.context("read the generation")?;
    let (handle, inbox) = dispatch::channel();
    let app = App {
        store,
        blobs,
        logs,
        sts: Arc::new(AwsSts::new(config.sts_endpoint.clone(), config.use_fips).await),
        clock,
        master,
        authority: Arc::new(authority),
        dispatch: handle,
        generation,
        session_floor: SESSION_FLOOR,
        lease_term: config.lease_term,
        force_cancel_grace: config.force_cancel_grace,
        gates: crate::app::run_output::Gates::default(),
        history: crate::app::history::History::default(),
        revocations: crate::auth::revocation::Revocations::default(),
        sign_ins: crate::app::sessions::Gate::default(),
        uploads: Uploads::default(),
        limits: crate::app::limits::Timer::default(),
        outbound: Arc::new(Outbound::open(&config.notices).context("prepare notices")?),
    };
    Ok((Arc::new(app), inbox))
}

/// Refuses a data directory that was whole once and of which a part is missing: a lost mount must
/// not look like a first start.
fn refuse_in_part(data: &Path) -> anyhow::Result<()> {
    if let Some(left) = backup::refuse_in_part(data) {
        anyhow::bail!(
            "use the data in {}: a restore into it has not come to its end ({} is there); run the \
             restore again",
            data.display(),
            left.display()
        );
    }
    if !data.join("authority").join("ca.pem").exists() {
        return Ok(());
    }
    for part in ["store", "blobs", "logs"] {
        let path = data.join(part);
        let is_there = std::fs::read_dir(&path).is_ok_and(|mut entries| match part {
            "store" => entries.next().is_some(),
            _ => true,
        });
        anyhow::ensure!(
            is_there,
            "find {} of a control plane that has run before; an empty one is never started in its \
             place: restore the data directory from a backup",
            path.display()
        );
    }
    Ok(())
}

/// Reads the number of this history; the first start begins with the first.
pub(crate) async fn generation(store: &dyn Store) -> anyhow::Result<Generation> {
    let key = keys::generation();
    if let Some(found) = store.fetch(&key).await? {
        let number: u64 = serde_json::from_slice(&found.value).context("it is malformed")?;
        return Ok(Generation::new(number));
    }
    let first = Generation::FIRST;
    match store.commit(Batch::new().put(key, Expect::Absent, encode(&first.get()))).await {
        Ok(_) | Err(CommitError::Conflict { .. }) => Ok(first),
        Err(CommitError::Store(error)) => Err(error.into()),
    }
}

async fn listen(
    app: Arc<App>,
    config: Config,
    people: TcpListener,
    runners: TcpListener,
    stopped: watch::Receiver<()>,
) -> anyhow::Result<()> {
    let identity = app.authority.server_identity(&config.names)?;
    let people_security = match config.people_transport {
        PeopleTransport::Tls => Security::tls(&identity)?,
        PeopleTransport::Plaintext => Security::Plaintext,
    };
    let runners_security = Security::mutual_tls(&identity, app.authority.certificate_pem())?;

    let mut people_server = grpc::server();
    if config.people_transport == PeopleTransport::Plaintext {
        // Terraform speaks HTTP/2 over TLS alone.
        people_server = people_server.accept_http1(true);
    }
    let people = people_server
        .layer(http::StateLayer { app: Arc::clone(&app) })
        .layer(grpc::PeopleLayer { app: Arc::clone(&app) })
        .add_routes(grpc::people(Arc::clone(&app)).await)
        .serve_with_incoming_shutdown(
            listener::incoming(people, people_security),
            until(stopped.clone()),
        );

    let runners = grpc::runners_server()
        .layer(grpc::RunnersLayer::new(Arc::clone(&app), config.stream_patience))
        .add_routes(grpc::runners(app))
        .serve_with_incoming_shutdown(
            listener::incoming(runners, runners_security),
            until(stopped),
        );

    let (people, runners) = tokio::join!(people, runners);
    people.context("serve people")?;
    runners.context("serve runners")
}

/// Binds with room for as many as come back at once after a restart.
fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    }?;
    // As std's own listeners do, so that a restart takes the port back at once.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

async fn until(mut stopped: watch::Receiver<()>) {
    // The sender says nothing; it is dropped.
    let _ = stopped.changed().await;
}

async fn told_to_stop() {
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}
