//! Writes who may do what, and what a phase is given for it, to `POLICY.md`: every level, phase,
//! kind of run, role of caller and credential mode, each tried out on stores and a double of STS.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use latchkey_domain::policy::{MfaPolicy, Phase};
use latchkey_domain::run::{Run, RunKind, RunState};
use secrecy::SecretString;

use super::App;
use super::authenticate_run::Submission;
use super::fixture::{Fixture, ORGANIZATION};
use super::queue_run::NewRun;
use super::service_tokens::TokenScope;
use super::settings::SettingsChange;
use super::start_job::Start;
use crate::auth::Caller;
use crate::error::Result;
use crate::store::BoxFuture;
use crate::store::record::authentication::Purpose;
use crate::store::record::environment::{CodeCredentials, PlainCredentials, RoleSettings, Roles};
use crate::store::record::people::Access;
use crate::sts::{Code, Credentials, Exchange, Identity, Sts, Wanted};

const LEVELS: [(MfaPolicy, &str); 3] = [
    (MfaPolicy::Never, "never"),
    (MfaPolicy::AppliesOnly, "applies only"),
    (MfaPolicy::PlansAndApplies, "plans and applies"),
];

const KINDS: [(RunKind, &str); 4] = [
    (RunKind::PlanAndApply, "plan and apply"),
    (RunKind::PlanOnly, "plan only"),
    (RunKind::Destroy, "destroy"),
    (RunKind::RefreshOnly, "refresh only"),
];

type Modes = (PlainCredentials, CodeCredentials);

/// Each mode of either sort at least once, beside another one of the other sort.
const MODES: [Modes; 4] = [
    (PlainCredentials::Static, CodeCredentials::Session),
    (PlainCredentials::None, CodeCredentials::Role),
    (PlainCredentials::Session, CodeCredentials::Session),
    (PlainCredentials::Role, CodeCredentials::Role),
];

/// The modes worth trying under a level: where both phases take a code, what there is without one
/// is never given.
fn modes(policy: MfaPolicy) -> &'static [Modes] {
    match policy {
        MfaPolicy::Never | MfaPolicy::AppliesOnly => &MODES,
        MfaPolicy::PlansAndApplies => &MODES[..2],
    }
}

fn mode_name((plain, by_code): Modes, needs_code: bool) -> &'static str {
    match (needs_code, by_code, plain) {
        (true, CodeCredentials::Session, _) => "by a code: session",
        (true, CodeCredentials::Role, _) => "by a code: role",
        (false, _, PlainCredentials::Session) => "without: session",
        (false, _, PlainCredentials::Role) => "without: role",
        (false, _, PlainCredentials::Static) => "without: static",
        (false, _, PlainCredentials::None) => "without: none",
    }
}

const ROLES: [&str; 6] = ["owner", "admin", "write", "read", "none", "service"];

/// What one phase became: what the caller could do, and what terraform was given.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Cell {
    needs_code: bool,
    caller: String,
    given: String,
}

/// What is given in a row, and what each role is answered.
type Table = BTreeMap<Row, (String, BTreeMap<usize, String>)>;

/// Level, kind, phase, mode.
type Row = (usize, usize, Phase, &'static str);

/// Says of its credentials how they were made, and takes every code.
struct Double {
    account: String,
}

impl Sts for Double {
    fn exchange<'a>(
        &'a self,
        _signer: &'a Credentials,
        code: Option<Code<'a>>,
        wanted: &'a Wanted,
    ) -> BoxFuture<'a, Exchange> {
        let what = if wanted.role.is_some() { "role" } else { "session" };
        let how = if code.is_some() { "with MFA" } else { "without MFA" };
        Box::pin(async move {
            Exchange::Issued {
                credentials: Credentials {
                    access_key_id: format!("{what} {how}"),
                    secret_access_key: "secret".into(),
                    session_token: Some("token".into()),
                    // No clock is read here: later than any of the test.
                    expires_at: Some(latchkey_domain::time::Timestamp::from_millis(i64::MAX / 2)),
                },
                request_id: None,
                packed_percent: None,
            }
        })
    }

    fn identify<'a>(&'a self, _: &'a Credentials, _: &'a str) -> BoxFuture<'a, Identity> {
        Box::pin(async move { Identity::Account(self.account.clone()) })
    }
}

struct Bed {
    fixture: Fixture,
    callers: Vec<Caller>,
    environments: u32,
    codes: u32,
}

impl Bed {
    async fn new() -> Bed {
        let mut fixture = Fixture::new(MfaPolicy::Never).await;
        let service = {
            let scope = TokenScope::default();
            let (app, owner) = (&fixture.app, &fixture.owner);
            let made = app.create_service_token(owner, ORGANIZATION, "ci", None, scope, "make-ci");
            app.caller(&made.await.unwrap().0).await.unwrap()
        };
        let mut callers = vec![fixture.owner.clone()];
        for (name, access) in [
            ("admin", Access::Admin),
            ("write", Access::Write),
            ("read", Access::Read),
            ("none", Access::None),
        ] {
            callers.push(fixture.member(name, access).await);
        }
        callers.push(service);
        let account = fixture.aws.facts().account_id;
        let app = Arc::into_inner(fixture.restarted(None).await).expect("nobody else has it yet");
        let (sts, dispatch) = (Arc::new(Double { account }), fixture.app.dispatch.clone());
        fixture.app = Arc::new(App { sts, dispatch, ..app });
        Bed { fixture, callers, environments: 0, codes: 0 }
    }

    async fn environment(
        &mut self,
        policy: MfaPolicy,
        plain: PlainCredentials,
        by_code: CodeCredentials,
    ) -> String {
        self.environments += 1;
        let name = format!("e{}", self.environments);
        let account = self.fixture.aws.facts().account_id;
        let role = |phase: &str| RoleSettings {
            arn: format!("arn:aws:iam::{account}:role/{phase}"),
            ..RoleSettings::default()
        };
        let settings = SettingsChange {
            policy: Some(policy),
            plain_credentials: Some(plain),
            code_credentials: Some(by_code),
            roles: Some(Roles { plan: role("plan"), apply: role("apply") }),
            ..SettingsChange::default()
        };
        let code = Some(self.code());
        let (app, owner) = (&self.fixture.app, &self.fixture.owner);
        app.create_environment(owner, ORGANIZATION, &name, settings, &name, code).await.unwrap();
        name
    }

    fn code(&mut self) -> SecretString {
        // A window of its own for each: how many a device may have is another test's business.
        self.fixture.clock.advance(Duration::from_secs(180));
        self.codes += 1;
        SecretString::from(format!("{:06}", self.codes))
    }

    async fn submit(&mut self, caller: &Caller, run: &Run) -> Result<Run> {
        let code = self.code();
        let submission = Submission {
            run: run.id,
            phase: if run.planned.is_some() { Phase::Apply } else { Phase::Plan },
            code,
            seen: run.planned.as_ref().map(|planned| planned.digest),
            request_id: format!("code-{}", self.codes),
            purpose: Purpose::Phase,
        };
        self.fixture.app.authenticate_run(caller, submission).await.map(|(run, _)| run)
    }

    /// Runs one run with a caller who tries everything; where they are refused, the owner goes on.
    async fn try_out(
        &mut self,
        (policy, kind): (MfaPolicy, RunKind),
        (plain, by_code): Modes,
        caller: &Caller,
    ) -> (Cell, Option<Cell>) {
        let environment = self.environment(policy, plain, by_code).await;
        let owner = self.fixture.owner.clone();
        let app = Arc::clone(&self.fixture.app);
        let new = NewRun {
            environment: environment.clone(),
            destroy_confirmation: environment.clone(),
            kind,
            ..self.fixture.new_run(&app, &environment).await
        };
        let mut told = vec![];
        let mut run = match app.queue_run(caller, new.clone()).await {
            Ok(run) => {
                told.push("queues".to_owned());
                run
            }
            Err(error) => {
                told.push(error.reason().name().to_owned());
                app.queue_run(&owner, new).await.unwrap()
            }
        };
        let needs_code = run.state == RunState::AwaitingPlanMfa;
        if needs_code {
            run = self.gate(caller, &run, &mut told).await;
        }
        let given = self.start(&run, Phase::Plan).await;
        told.dedup();
        let plan = Cell { needs_code, caller: told.join(", "), given };
        let run = self.fixture.run(&run).await;
        if run.state == RunState::Planned {
            return (plan, None);
        }
        let mut told = vec![];
        let needs_code = run.state == RunState::AwaitingApplyMfa;
        let run = self.gate(caller, &run, &mut told).await;
        assert_eq!(run.state, RunState::ApplyQueued);
        let given = self.start(&run, Phase::Apply).await;
        (plan, Some(Cell { needs_code, caller: told.join(", "), given }))
    }

    /// Passes what the run waits for, by the caller, or else by the owner.
    async fn gate(&mut self, caller: &Caller, run: &Run, told: &mut Vec<String>) -> Run {
        let owner = self.fixture.owner.clone();
        let takes_code = run.state != RunState::AwaitingConfirmation;
        for who in [caller, &owner] {
            let passed = if takes_code {
                self.submit(who, run).await
            } else {
                let seen = run.planned.as_ref().unwrap().digest;
                self.fixture.app.confirm_run(who, run.id, seen).await
            };
            match passed {
                Ok(run) => {
                    if who == caller {
                        told.push(if takes_code { "code" } else { "confirms" }.to_owned());
                    }
                    return run;
                }
                Err(error) => told.push(error.reason().name().to_owned()),
            }
        }
        panic!("not even the owner passes {}", run.state);
    }

    /// Starts a phase, says what it was given, and ends a plan.
    async fn start(&self, run: &Run, phase: Phase) -> String {
        let (runner, lease, start) = self.fixture.start(run, phase).await;
        let Start::Go(go) = start else { panic!("{start:?}") };
        if phase == Phase::Plan {
            self.fixture.end_plan(&runner, lease, b"{}").await;
        }
        match go.session {
            None => "nothing".to_owned(),
            Some(given) if given.session_token.is_some() => given.access_key_id,
            Some(_) => "the long-term keys".to_owned(),
        }
    }
}

/// Tries out all there is under one level.
async fn tried_out(level: usize) -> Table {
    let mut bed = Bed::new().await;
    let mut table = Table::new();
    let policy = LEVELS[level].0;
    for (number, (kind, _)) in KINDS.into_iter().enumerate() {
        for modes in modes(policy) {
            for role in 0..ROLES.len() {
                let caller = bed.callers[role].clone();
                let (plan, apply) = bed.try_out((policy, kind), *modes, &caller).await;
                for (phase, cell) in [(Phase::Plan, Some(plan)), (Phase::Apply, apply)] {
                    let Some(cell) = cell else { continue };
                    check(policy, phase, role, &cell);
                    let mode = mode_name(*modes, cell.needs_code);
                    let (given, roles) = table
                        .entry((level, number, phase, mode))
                        .or_insert_with(|| (cell.given.clone(), BTreeMap::new()));
                    // The mode that does not matter, does not matter.
                    assert_eq!(*given, cell.given);
                    let known = roles.entry(role).or_insert_with(|| cell.caller.clone());
                    assert_eq!(*known, cell.caller);
                }
            }
        }
    }
    table
}

/// What must be so, whatever the file says.
fn check(policy: MfaPolicy, phase: Phase, role: usize, cell: &Cell) {
    assert_eq!(cell.needs_code, policy.requires_code(phase));
    assert_eq!(cell.given.ends_with("with MFA"), cell.needs_code, "{cell:?}");
    let decides = cell.caller.contains("code") || cell.caller.contains("confirms");
    match ROLES[role] {
        "owner" | "admin" | "write" => {
            assert_eq!(decides, cell.needs_code || phase == Phase::Apply);
        }
        _ => assert!(!decides, "{} decides: {cell:?}", ROLES[role]),
    }
}

fn written(table: &Table) -> String {
    let mut text = String::from(
        "# Who may do what, and what a phase is given\n\nWritten by a test of the control plane, \
         which tries each cell out; do not edit. A row is a phase and a credential mode of the \
         environment: what terraform gets when the phase takes no code, or what a code buys. The \
         columns to the right are what a caller of that role is answered who queues the run and \
         passes what it waits for; a refusal is named as `ErrorInfo.reason` names it. `none` is a \
         member without access to the environment; `service` is a service token with write \
         access.\n",
    );
    let mut section = None;
    for ((level, kind, phase, mode), (given, roles)) in table {
        if section != Some((level, kind)) {
            section = Some((level, kind));
            let (level, kind) = (LEVELS[*level].1, KINDS[*kind].1);
            let heads = ROLES.join(" | ");
            let rules = "---|".repeat(ROLES.len());
            let _ = write!(
                text,
                "\n## {level}, {kind}\n\n| phase | credentials | given | {heads} |\n\
                 |---|---|---|{rules}\n"
            );
        }
        let cells: Vec<_> = roles.values().map(String::as_str).collect();
        let _ = writeln!(text, "| {phase} | {mode} | {given} | {} |", cells.join(" | "));
    }
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn the_committed_policy_table_is_what_happens() {
    // Side by side: most of it is waiting for the disk.
    let levels = [0, 1, 2].map(|level| tokio::spawn(tried_out(level)));
    let mut table = Table::new();
    for level in levels {
        table.append(&mut level.await.unwrap());
    }
    let table = written(&table);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("POLICY.md");
    if std::fs::read_to_string(&path).unwrap_or_default() != table {
        std::fs::write(&path, table).unwrap();
        panic!("POLICY.md was out of date and has been rewritten: review and commit it");
    }
}
