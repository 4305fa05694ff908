//! The control plane on a simulated host: the real use cases, dispatch and gRPC services, over
//! the watched store. Files lie in a directory that outlives crashes of the host.

use std::sync::Arc;
use std::time::Duration;

use latchkey_control_plane::app::App;
use latchkey_control_plane::app::history::History;
use latchkey_control_plane::app::lease_job::SESSION_FLOOR;
use latchkey_control_plane::app::run_output::Gates;
use latchkey_control_plane::app::settings::SettingsChange;
use latchkey_control_plane::app::uploads::Uploads;
use latchkey_control_plane::app::variables::{NewVariable, Scope};
use latchkey_control_plane::auth::revocation::Revocations;
use latchkey_control_plane::auth::{Caller, sha256};
use latchkey_control_plane::authority::Authority;
use latchkey_control_plane::blobs::Blobs;
use latchkey_control_plane::clock::Clock;
use latchkey_control_plane::dispatch;
use latchkey_control_plane::grpc;
use latchkey_control_plane::reaper;
use latchkey_control_plane::run_log::{self, RunLogs};
use latchkey_control_plane::store::record::runner::Runner;
use latchkey_control_plane::store::record::variable::Category;
use latchkey_control_plane::store::record::{Text, encode};
use latchkey_control_plane::store::{Batch, Expect, Store, keys};
use latchkey_control_plane::sts::Sts;
use latchkey_domain::id::Generation;
use latchkey_domain::policy::MfaPolicy;

use crate::net::{self, IdentityLayer};
use crate::planted::Planted;
use crate::sts::{ACCOUNT, SimulatedSts};
use crate::world::{Furniture, World};

pub(crate) const ORGANIZATION: &str = "acme";
pub(crate) const ENVIRONMENTS: [(&str, MfaPolicy); 3] = [
    ("guarded", MfaPolicy::PlansAndApplies),
    ("web", MfaPolicy::AppliesOnly),
    ("open", MfaPolicy::Never),
];
const POOL: &str = "builders";
const CONFIGURATION: &[u8] = b"a configuration";

/// The life of a lease without a heartbeat.
const TERM: Duration = Duration::from_secs(2);

/// How long a graceful cancel has: half a second of the simulation.
const FORCE_GRACE: Duration = Duration::from_secs(30);

/// The life of sessions: 15 seconds of the simulation.
const SESSION: Duration = Duration::from_secs(15 * 60);

/// The software of the control plane's host.
pub(crate) async fn host(world: Arc<World>) -> turmoil::Result {
    let (handle, inbox) = dispatch::channel();
    let app = Arc::new(open(&world, handle)?);
    if world.furniture.get().is_none() {
        let furniture = furnish(&world, &app).await?;
        let _ = world.furniture.set(furniture);
        world.model.arm();
    }
    app.begin_incarnation().await?;
    app.recall_alarm().await?;
    app.settle_restore().await?;
    app.settle_authentications().await?;
    let people = net::listen(net::PEOPLE_PORT).await?;
    let runners = net::listen(net::RUNNERS_PORT).await?;
    let leases = Arc::new(Planted { app: Arc::clone(&app), world: Arc::clone(&world) });
    tokio::spawn(inbox.run(leases, TERM));
    app.give_all_turns().await?;
    app.collect_garbage().await?;
    app.reconcile().await?;
    tokio::spawn(reaper::run(Arc::clone(&app)));
    world.model.note("the plane is up");
    let people = grpc::server()
        .layer(grpc::PeopleLayer { app: Arc::clone(&app) })
        .add_routes(grpc::people(Arc::clone(&app)).await)
        .serve_with_incoming(people);
    let runners = grpc::server()
        .layer(IdentityLayer { app: Arc::clone(&app) })
        .add_routes(grpc::runners(app))
        .serve_with_incoming(runners);
    tokio::try_join!(people, runners)?;
    Ok(())
}

fn open(world: &Arc<World>, dispatch: dispatch::Handle) -> anyhow::Result<App> {
    let path = &world.directory;
    let clock: Arc<dyn Clock> = Arc::clone(&world.clock) as Arc<dyn Clock>;
    let authority = Authority::open(&path.join("authority"), &world.master, Arc::clone(&clock))?;
    let store: Arc<dyn Store> = world.store();
    let sts: Arc<dyn Sts> = Arc::new(SimulatedSts { world: Arc::clone(world) });
    Ok(App {
        outbound: Arc::new(latchkey_control_plane::notices::Outbound::closed()),
        store,
        blobs: Blobs::open(path.join("blobs"), Arc::clone(&world.master))?,
        logs: RunLogs::open(run_log::Options::new(world.logs_directory()))?,
        sts,
        clock,
        master: Arc::clone(&world.master),
        authority: Arc::new(authority),
        dispatch,
        generation: Generation::FIRST,
        session_floor: SESSION_FLOOR,
        lease_term: TERM,
        force_cancel_grace: FORCE_GRACE,
        history: History::default(),
        revocations: Revocations::default(),
        sign_ins: latchkey_control_plane::app::sessions::Gate::default(),
        gates: Gates::default(),
        limits: latchkey_control_plane::app::limits::Timer::default(),
        uploads: Uploads::default(),
    })
}

/// Makes the organization, its owner, environments, triple, configuration and runners.
async fn furnish(world: &World, app: &Arc<App>) -> anyhow::Result<Furniture> {
    let secret = app.prepare_bootstrap().await?;
    let secret = secret.ok_or_else(|| anyhow::anyhow!("find a store that is new"))?;
    let token = app.bootstrap(&secret, ORGANIZATION, "ada").await?;
    let owner = app.caller(&token).await?;
    app.update_organization(&owner, ORGANIZATION, vec![ACCOUNT.to_owned()], None).await?;
    let serial = format!("arn:aws:iam::{ACCOUNT}:mfa/ada");
    set(app, &owner, "AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE").await?;
    set(app, &owner, "AWS_SECRET_ACCESS_KEY", "a secret").await?;
    set(app, &owner, "AWS_MFA_SERIAL_NUMBER", &serial).await?;
    let pool = app.create_pool(&owner, ORGANIZATION, POOL, "pool").await?;
    for (name, policy) in ENVIRONMENTS {
        let settings = SettingsChange {
            policy: Some(policy),
            pool: Some(POOL.to_owned()),
            session_duration: Some(SESSION),
            ..SettingsChange::default()
        };
        app.create_environment(&owner, ORGANIZATION, name, settings, name, None).await?;
    }
    let organization = pool.organization.0;
    let digest = app.blobs.put(organization, CONFIGURATION).await?;
    let mut batch = Batch::new().put(
        keys::configuration(organization, &digest),
        Expect::Absent,
        b"{}".as_slice(),
    );
    for machine in world.machines().iter().filter(|machine| !machine.name.starts_with("clone")) {
        let record = Runner {
            id: Text(machine.runner),
            name: machine.name.clone(),
            pool: pool.id,
            organization: pool.organization,
            key: Text(machine.key),
            enrolled_at: app.now().into(),
            said: None,
            drained_at: None,
            revoked_at: None,
            fought_at: None,
        };
        batch = batch
            .put(keys::runner(machine.runner), Expect::Absent, encode(&record))
            .put(
                keys::runner_by_key(machine.key.as_bytes()),
                Expect::Absent,
                encode(&Text(machine.runner)),
            )
            .put(keys::runner_by_pool(pool.id.0, machine.runner), Expect::Absent, []);
    }
    app.store.commit(batch).await?;
    Ok(Furniture { token, configuration: sha256(CONFIGURATION).to_string() })
}

async fn set(app: &Arc<App>, owner: &Caller, name: &str, value: &str) -> anyhow::Result<()> {
    let variable = NewVariable {
        name: name.into(),
        category: Category::Environment,
        value: value.into(),
        sensitive: true,
        hcl: false,
    };
    app.set_variable(owner, ORGANIZATION, &Scope::Organization, variable, None).await?;
    Ok(())
}
