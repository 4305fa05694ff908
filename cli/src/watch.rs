//! Following a run to its end: one loop that owns everything that changes, and hears of the run,
//! the log, the person and Ctrl-C.
//!
//! The log of a phase is shown whole before anything that comes after it, so a person has read
//! the plan when they are asked for its approval.

use std::future::pending;
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use serde::Serialize;
use serde_json::Value;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep;

use latchkey_proto::v1;
use latchkey_proto::v1::{Lock, Phase, RunState};

use crate::client::{Client, Patience};
use crate::code::{self, Next, Wanted};
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::follow::{self, Until, Update};
use crate::input::{Answer, Question, TerminalGuard};
use crate::log_view::{LogView, clean};
use crate::output::{AMBER, BOLD, GREEN, RED};
use crate::view::run as view;
use crate::view::run::RunView;
use crate::words::{Word, end_of, explain};

/// A log that says nothing for this long after its phase is over has ended without saying so.
const LOG_GRACE: Duration = Duration::from_secs(3);

/// Whether codes and confirmations are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asking {
    Yes,
    No,
}

/// How the log reaches standard output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LogForm {
    Text,
    /// The canonical log, byte by byte.
    Raw,
    /// Among the other events, one object a line.
    Events,
}

#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Event {
    Run { run: Box<RunView> },
    Log { phase: String, line: Value },
}

/// Follows a run until it has ended or nobody can bring it on.
pub(crate) async fn follow(
    context: &mut Context,
    client: &Client,
    run: v1::Run,
    asking: Asking,
    form: LogForm,
) -> Result<Exit, Failure> {
    let _restored = context.input.is_terminal().then(TerminalGuard::new);
    let mut interrupts = signal(SignalKind::interrupt()).map_err(Failure::Input)?;
    let mut updates = Some(follow::watch_run(client, &run.run_id));
    let mut watch = Watch {
        context,
        client,
        run,
        asking,
        form,
        log: None,
        followed: Vec::new(),
        question: None,
        shown: Shown::default(),
    };
    watch.tell()?;
    loop {
        if let Some(exit) = watch.advance()? {
            return Ok(exit);
        }
        let overdue = watch.log_is_overdue();
        let exit = tokio::select! {
            _ = interrupts.recv() => Some(watch.detach()),
            update = next(&mut updates) => {
                match update {
                    Some(update) => watch.hear(update)?,
                    None => updates = None,
                }
                None
            }
            piece = next_log(&mut watch.log) => {
                watch.log_piece(piece)?;
                None
            }
            answer = answered(&mut watch.question) => {
                watch.take_answer(answer, &mut interrupts).await?
            }
            () = sleep(LOG_GRACE), if overdue => {
                watch.end_log()?;
                None
            }
        };
        if let Some(exit) = exit {
            return Ok(exit);
        }
    }
}

struct Watch<'a> {
    context: &'a mut Context,
    client: &'a Client,
    run: v1::Run,
    asking: Asking,
    form: LogForm,
    log: Option<Log>,
    /// Phases whose log was begun.
    followed: Vec<Phase>,
    question: Option<Open>,
    shown: Shown,
}

struct Log {
    phase: Phase,
    view: LogView,
    pieces: mpsc::Receiver<Update<Vec<u8>>>,
}

/// A question that was asked and is not answered.
struct Open {
    wants: Wants,
    answer: oneshot::Receiver<Answer>,
    /// Whether the person was told that it has lost its meaning.
    told: bool,
}

/// What the run waits for a person to give.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Wants {
    Code(Wanted),
    Confirmation { plan_digest: String },
}

/// What was shown last, so that only news is shown.
#[derive(Default)]
struct Shown {
    state: Option<(RunState, String, u32)>,
    authenticated: Vec<String>,
    refusal: Option<v1::AuthenticationRefusal>,
    /// Reason of the refusal that our own submission got, which the run will tell once more.
    own_refusal: Option<String>,
    canceling: bool,
    waiting: bool,
}

impl Watch<'_> {
    /// Does what the run as it is asks for; tells the end when it has come.
    fn advance(&mut self) -> Result<Option<Exit>, Failure> {
        if self.run.cancel_requested && !self.shown.canceling {
            self.shown.canceling = true;
            self.context.output.note("A stop was asked for; terraform is finishing.");
        }
        if self.log.is_some() {
            return Ok(None);
        }
        if let Some(phase) = self.due_log() {
            self.show()?;
            self.followed.push(phase);
            self.log = Some(Log {
                phase,
                view: LogView::new(self.context.output.colour()),
                pieces: follow::read_log(self.client, &self.run.run_id, phase, Until::Finished),
            });
            return Ok(None);
        }
        self.show()?;
        if let Some(exit) = end_of(self.run.state()) {
            self.conclude()?;
            return Ok(Some(exit));
        }
        self.ask();
        Ok(None)
    }

    fn due_log(&self) -> Option<Phase> {
        let begun = |facts: &Option<v1::JobFacts>| {
            facts.as_ref().is_some_and(|facts| facts.start_time.is_some() || facts.log_length > 0)
        };
        let state = self.run.state();
        let due = [
            (Phase::Plan, begun(&self.run.plan) || state == RunState::Planning),
            (Phase::Apply, begun(&self.run.apply) || state == RunState::Applying),
        ];
        due.into_iter()
            .find(|(phase, due)| *due && !self.followed.contains(phase))
            .map(|(phase, _)| phase)
    }

    fn hear(&mut self, update: Update<v1::Run>) -> Result<(), Failure> {
        match update {
            Update::Item(run) => self.learn(run)?,
            Update::Trouble(problem) => self.trouble(&problem),
            Update::Failed(failure) => return Err(failure),
        }
        Ok(())
    }

    /// Takes the run as it is now. An answer and the stream may cross: the older one is dropped.
    fn learn(&mut self, run: v1::Run) -> Result<(), Failure> {
        let time = |run: &v1::Run| run.update_time.map(|time| (time.seconds, time.nanos));
        if run.run_id != self.run.run_id || time(&run) < time(&self.run) {
            return Ok(());
        }
        let news = run != self.run;
        self.run = run;
        if news { self.tell() } else { Ok(()) }
    }

    /// Tells programs how the run is now.
    fn tell(&mut self) -> Result<(), Failure> {
        if self.form != LogForm::Events {
            return Ok(());
        }
        let run = Box::new(RunView::new(&self.run));
        self.context.output.json_line(&Event::Run { run })
    }

    fn log_piece(&mut self, piece: Option<Update<Vec<u8>>>) -> Result<(), Failure> {
        let Some(log) = &mut self.log else { return Ok(()) };
        match piece {
            Some(Update::Item(bytes)) => match self.form {
                LogForm::Text => {
                    let text = log.view.push(&bytes);
                    self.context.output.text(&text)
                }
                LogForm::Raw => self.context.output.bytes(&bytes),
                LogForm::Events => {
                    let phase = log.phase.snake();
                    for line in log.view.lines(&bytes) {
                        let line = serde_json::from_str(&line).unwrap_or(Value::String(line));
                        let event = Event::Log { phase: phase.clone(), line };
                        self.context.output.json_line(&event)?;
                    }
                    Ok(())
                }
            },
            Some(Update::Trouble(problem)) => {
                self.trouble(&problem);
                Ok(())
            }
            Some(Update::Failed(failure)) => Err(failure),
            None => self.end_log(),
        }
    }

    fn end_log(&mut self) -> Result<(), Failure> {
        let Some(mut log) = self.log.take() else { return Ok(()) };
        match self.form {
            LogForm::Text => self.context.output.text(&log.view.finish()),
            LogForm::Raw | LogForm::Events => Ok(()),
        }
    }

    /// Tells whether the log that is followed belongs to a phase that is over.
    fn log_is_overdue(&self) -> bool {
        let active = match self.run.state() {
            RunState::PlanQueued | RunState::Planning => Some(Phase::Plan),
            RunState::ApplyQueued | RunState::Applying => Some(Phase::Apply),
            RunState::Unspecified
            | RunState::AwaitingPlanMfa
            | RunState::Pending
            | RunState::AwaitingConfirmation
            | RunState::AwaitingApplyMfa
            | RunState::Planned
            | RunState::Applied
            | RunState::Errored
            | RunState::Canceled
            | RunState::Discarded
            | RunState::Lost => None,
        };
        self.log.as_ref().is_some_and(|log| active != Some(log.phase))
    }

    /// Shows what is new about the run.
    fn show(&mut self) -> Result<(), Failure> {
        for line in view::authenticated(&self.run) {
            if !self.shown.authenticated.contains(&line) {
                let text = self.context.output.paint(GREEN, &line);
                self.context.output.note(&text);
                self.shown.authenticated.push(line);
            }
        }
        let run = &self.run;
        let state = (run.state(), run.reason.clone(), run.queue_position);
        if self.shown.state.as_ref() != Some(&state) {
            let mut line = self.context.output.paint(BOLD, &run.state().camel());
            line.push_str(&format!(": {}", explain(run.state())));
            if run.queue_position > 0 {
                line.push_str(&format!(", {} in line", run.queue_position));
            }
            if !run.reason.is_empty() {
                line.push_str(&format!(" ({})", clean(&run.reason)));
            }
            self.context.output.note(&line);
            self.shown.state = Some(state);
            self.shown.waiting = false;
        }
        self.show_refusal();
        Ok(())
    }

    /// Shows a refusal, unless it is the one that we were answered ourselves.
    fn show_refusal(&mut self) {
        let refusal = self.run.last_refusal.clone().filter(|_| self.run.lock() == Lock::Failed);
        let Some(refusal) = refusal else { return };
        if self.shown.refusal.as_ref() == Some(&refusal) {
            return;
        }
        if self.shown.own_refusal.take().as_deref() != Some(refusal.reason.as_str()) {
            let text = format!("A code was refused: {}", clean(&refusal.message));
            let text = self.context.output.paint(RED, &text);
            self.context.output.note(&text);
        }
        self.shown.refusal = Some(refusal);
    }

    fn wants(&self) -> Option<Wants> {
        if let Some(wanted) = Wanted::of(&self.run) {
            return Some(Wants::Code(wanted));
        }
        (self.run.state() == RunState::AwaitingConfirmation)
            .then(|| Wants::Confirmation { plan_digest: code::digest(&self.run) })
    }

    /// Asks the person for what the run waits for.
    fn ask(&mut self) {
        let wants = self.wants();
        if let Some(open) = &mut self.question {
            if Some(&open.wants) != wants.as_ref() && !open.told {
                open.told = true;
                self.context.output.note("Somebody else answered; press Enter to go on.");
            }
            return;
        }
        let Some(wants) = wants else { return };
        if !self.shown.waiting {
            self.shown.waiting = true;
            self.explain_wait();
        }
        if self.asking == Asking::No {
            return;
        }
        let (prompt, hidden) = match &wants {
            Wants::Code(wanted) => (wanted.prompt(), true),
            Wants::Confirmation { .. } => ("Apply this plan? Only `yes` confirms it", false),
        };
        if !self.context.input.is_terminal() {
            self.context.output.note(&format!("{prompt}: the next line of standard input"));
        }
        let prompt = format!("{prompt}: ");
        let question = match hidden {
            true => Question::Hidden(prompt),
            false => Question::Visible(prompt),
        };
        let answer = self.context.input.ask(question);
        self.question = Some(Open { wants, answer, told: false });
    }

    fn explain_wait(&mut self) {
        let output = &mut self.context.output;
        if self.run.state() != RunState::AwaitingPlanMfa
            && let Some(plan) = &self.run.plan_result
        {
            let counts = output.paint(BOLD, &view::counts(plan));
            output.note(&counts);
            if !self.run.code_reason.is_empty() {
                let why = clean(&self.run.code_reason);
                let why = output.paint(AMBER, &why);
                output.note(&why);
            }
            for line in view::before_apply(&self.run) {
                let line = output.paint(AMBER, &line);
                output.note(&line);
            }
        }
        let lock = view::lock(&self.run);
        if !lock.is_empty() {
            let style = if self.run.lock() == Lock::Failed { RED } else { AMBER };
            let lock = output.paint(style, &lock);
            output.note(&format!("lock: {lock}"));
        }
        if self.asking == Asking::No
            && let Some(next) = view::next_step(&self.run)
        {
            output.hint(&next);
        }
    }

    async fn take_answer(
        &mut self,
        answer: Result<Answer, oneshot::error::RecvError>,
        interrupts: &mut Signal,
    ) -> Result<Option<Exit>, Failure> {
        let Some(open) = self.question.take() else { return Ok(None) };
        let answer = match answer {
            Ok(Ok(Some(answer))) => answer,
            Ok(Err(error)) if error.kind() == std::io::ErrorKind::Interrupted => {
                return Ok(Some(self.detach()));
            }
            Ok(Err(error)) => return Err(Failure::Input(error)),
            Ok(Ok(None)) | Err(_) => {
                let next = view::next_step(&self.run).unwrap_or_default();
                let wanted = match open.wants {
                    Wants::Code(_) => "a token code",
                    Wants::Confirmation { .. } => "a confirmation",
                };
                return Err(Failure::NobodyToAsk { wanted: wanted.into(), hint: next });
            }
        };
        // A code serves the phase it was asked for and no other.
        if self.wants().as_ref() != Some(&open.wants) {
            if !answer.expose_secret().trim().is_empty() {
                self.context.output.note("Not sent: the run does not wait for it any more.");
            }
            return Ok(None);
        }
        match open.wants {
            Wants::Code(wanted) => self.submit(&wanted, &answer, interrupts).await,
            Wants::Confirmation { plan_digest } => self.confirm(&answer, plan_digest).await,
        }
    }

    async fn submit(
        &mut self,
        wanted: &Wanted,
        code: &SecretString,
        interrupts: &mut Signal,
    ) -> Result<Option<Exit>, Failure> {
        let run_id = self.run.run_id.clone();
        let submission = code::submit(self.client, &run_id, wanted, code, Patience::Long);
        tokio::pin!(submission);
        let mut leaving = false;
        let result = loop {
            tokio::select! {
                result = &mut submission => break result,
                _ = interrupts.recv() => {
                    if leaving {
                        return Ok(Some(self.detach()));
                    }
                    leaving = true;
                    self.context.output.note(
                        "The code is on its way; its answer is awaited. Ctrl-C again leaves at \
                         once.",
                    );
                }
            }
        };
        match result {
            Ok(run) => self.learn(run)?,
            Err(failure) => self.refused(failure).await?,
        }
        if leaving {
            self.show()?;
            return Ok(Some(self.detach()));
        }
        Ok(None)
    }

    async fn refused(&mut self, failure: Failure) -> Result<(), Failure> {
        let Failure::Refused(refusal) = &failure else { return Err(failure) };
        let next = code::after(refusal);
        if next == Next::GiveUp {
            return Err(failure);
        }
        self.shown.own_refusal = Some(refusal.reason_name.clone());
        self.context.output.failure(&failure);
        if next == Next::LookAgain {
            let run = fetch(self.client, &self.run.run_id).await?;
            self.learn(run)?;
        }
        Ok(())
    }

    async fn confirm(
        &mut self,
        answer: &SecretString,
        plan_digest: String,
    ) -> Result<Option<Exit>, Failure> {
        if answer.expose_secret().trim() != "yes" {
            self.context.output.note("Not confirmed; the run keeps waiting.");
            if let Some(next) = view::next_step(&self.run) {
                self.context.output.hint(&next);
            }
            return Ok(Some(Exit::WaitsForPerson));
        }
        let request = v1::ConfirmRequest { run_id: self.run.run_id.clone(), plan_digest };
        let answer = self
            .client
            .call_with(Patience::Long, || {
                let (mut runs, request) = (self.client.runs(), request.clone());
                async move { runs.confirm(request).await }
            })
            .await;
        match answer {
            Ok(answer) => self.learn(answer.run.unwrap_or_default())?,
            Err(failure) => self.refused(failure).await?,
        }
        Ok(None)
    }

    fn conclude(&mut self) -> Result<(), Failure> {
        if self.form == LogForm::Text {
            let outputs = view::outputs(&self.run);
            self.context.output.text(&outputs)?;
        }
        if self.run.state() == RunState::Planned
            && let Some(plan) = &self.run.plan_result
        {
            self.context.output.note(&view::counts(plan));
        }
        let hint = match self.run.state() {
            RunState::Errored | RunState::Lost => Some(format!(
                "`latchkey run show {id}` and `latchkey logs {id}` say more",
                id = self.run.run_id
            )),
            RunState::Unspecified
            | RunState::AwaitingPlanMfa
            | RunState::Pending
            | RunState::PlanQueued
            | RunState::Planning
            | RunState::AwaitingConfirmation
            | RunState::AwaitingApplyMfa
            | RunState::ApplyQueued
            | RunState::Applying
            | RunState::Planned
            | RunState::Applied
            | RunState::Canceled
            | RunState::Discarded => None,
        };
        if let Some(hint) = hint {
            self.context.output.hint(&hint);
        }
        Ok(())
    }

    fn trouble(&mut self, problem: &str) {
        self.context.output.note(&format!("Connection lost, trying again: {problem}"));
    }

    fn detach(&mut self) -> Exit {
        let id = self.run.run_id.clone();
        self.context.output.note(&format!("\nDetached; run {id} goes on."));
        self.context.output.hint(&format!(
            "come back with `latchkey run watch {id}`; stop it with `latchkey cancel {id}`"
        ));
        Exit::Detached
    }
}

/// Asks for a run.
pub(crate) async fn fetch(client: &Client, run_id: &str) -> Result<v1::Run, Failure> {
    let request = v1::GetRunRequest { run_id: run_id.to_owned() };
    let answer = client
        .call(|| {
            let (mut runs, request) = (client.runs(), request.clone());
            async move { runs.get_run(request).await }
        })
        .await?;
    Ok(answer.run.unwrap_or_default())
}

async fn next<T>(updates: &mut Option<mpsc::Receiver<T>>) -> Option<T> {
    match updates {
        Some(updates) => updates.recv().await,
        None => pending().await,
    }
}

async fn next_log(log: &mut Option<Log>) -> Option<Update<Vec<u8>>> {
    match log {
        Some(log) => log.pieces.recv().await,
        None => pending().await,
    }
}

async fn answered(question: &mut Option<Open>) -> Result<Answer, oneshot::error::RecvError> {
    match question {
        Some(open) => (&mut open.answer).await,
        None => pending().await,
    }
}
