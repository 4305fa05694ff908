//! What the agent does with each frame of the lease stream. Most go to the job they are about.

use std::collections::HashMap;

use latchkey_proto::v1;
use latchkey_proto::v1::lease_request::Frame as Request;
use latchkey_proto::v1::lease_response::Frame as Response;
use tokio::time::Duration;

use super::intake;
use super::job::Origin;
use super::told::{Event, Told};
use super::{Agent, Held};
use crate::config::Lifetime;
use crate::host;
use crate::job::{Lease, Phase, Spec};
use crate::job_directory::{JobDirectory, Settings};
use crate::lease::{self, Connection};
use crate::spool::Room;

/// A control plane refuses a stream that names more.
const MOST_NAMED: usize = 256;

/// What becomes of an offer that this runner could prepare.
enum Answer {
    Accept,
    /// For another runner.
    HandBack,
    /// For another runner, after a pause: this one cannot take it, and would be asked again at
    /// once.
    HandBackAfter(Duration),
}

impl Agent {
    /// Step 1.
    pub(super) fn hello(&mut self) -> v1::Hello {
        v1::Hello {
            slots: match self.config.lifetime {
                Lifetime::UntilStopped => self.config.slots,
                Lifetime::OneJob => 1,
            },
            engines: self.engines.to_wire(),
            labels: HashMap::from_iter(self.config.labels.clone()),
            held: named(&self.jobs).iter().map(Lease::to_wire).collect(),
            version: env!("CARGO_PKG_VERSION").into(),
            accepts: match self.config.accepts {
                None => vec![],
                Some(Phase::Plan) => vec![v1::Phase::Plan.into()],
                Some(Phase::Apply) => vec![v1::Phase::Apply.into()],
            },
            host: Some(host::facts(&self.isolation)),
            seen: self.seen.kept(),
            draining: self.intake.is_leaving() || self.intake.is_unfit(),
        }
    }

    /// Step 2.
    pub(super) fn welcomed(&mut self, welcome: &v1::Welcome) {
        self.seen.note(welcome.history.clone());
        self.intake.resume();
        self.named.clear();
        let (keep, give_up) = (leases(&welcome.keep), leases(&welcome.give_up));
        for (lease, held) in &mut self.jobs {
            // Of one that was not named, what was said last still holds.
            held.is_lost = (held.is_lost && !keep.contains(lease)) || give_up.contains(lease);
            held.told.send(if held.is_lost { Told::GiveUp } else { Told::Keep });
        }
    }

    /// Step 5.
    pub(super) fn beat(&mut self, connection: &mut Connection) -> Result<u64, lease::Error> {
        self.named = named(&self.jobs);
        connection.beat(self.named.iter().map(Lease::to_wire).collect())
    }

    pub(super) fn frame(
        &mut self,
        frame: Response,
        connection: &mut Connection,
    ) -> Result<(), lease::Error> {
        match frame {
            Response::Offer(offer) => self.offered(offer, connection)?,
            Response::Go(mut go) => {
                // Whoever starts terraform can prove later that it was released.
                self.seen.note(go.history.take());
                self.seen.keep();
                self.tell(go.lease.clone(), Told::Go(Box::new(go)));
            }
            Response::Cancel(cancel) => {
                self.tell(cancel.lease, Told::Cancel { force: cancel.force });
            }
            Response::Revoke(revoke) => {
                tracing::info!(reason = %revoke.reason, "a lease is revoked");
                self.tell(revoke.lease, Told::Revoke);
            }
            Response::Recorded(recorded) => self.tell(recorded.lease, Told::Recorded),
            Response::Drain(v1::Drain {}) => {
                tracing::info!("drained by a person: no job is taken");
                self.intake.drain();
            }
            Response::Resume(v1::Resume {}) => {
                tracing::info!("a person has taken the drain back");
                self.intake.resume();
            }
            Response::Renewed(renewed) => {
                self.seen.note(renewed.history);
                let renewed = leases(&renewed.lease);
                // One accepted since the heartbeat cannot be in its answer.
                for lease in self.named.iter().filter(|lease| !renewed.contains(lease)) {
                    if let Some(held) = self.jobs.get_mut(lease) {
                        held.is_lost = true;
                        held.told.send(Told::NotRenewed);
                    }
                }
            }
            // It is the first frame, and was.
            Response::Welcome(_) => {}
        }
        Ok(())
    }

    fn offered(
        &mut self,
        offer: v1::Offer,
        connection: &mut Connection,
    ) -> Result<(), lease::Error> {
        let lease = offer.lease.clone();
        match self.accept(offer) {
            Ok(Answer::Accept) => {
                connection.send(Request::Accept(v1::Accept { lease }))?;
                if self.config.lifetime == Lifetime::OneJob {
                    self.drain(Some(connection))?;
                }
                Ok(())
            }
            Ok(Answer::HandBack) => {
                connection.send(Request::NeverStarted(v1::NeverStarted { lease }))
            }
            Ok(Answer::HandBackAfter(wait)) => {
                let events = self.events_to.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(wait).await;
                    let frame = Request::NeverStarted(v1::NeverStarted { lease });
                    let _ = events.send(Event::Send(Box::new(frame))).await;
                });
                Ok(())
            }
            Err(reason) => {
                tracing::warn!(%reason, "declined an offer");
                connection.send(Request::Decline(v1::Decline { lease, reason }))
            }
        }
    }

    /// Step 3. Answers why the job cannot be prepared on a runner like this one: that ends it.
    ///
    /// Slots are counted by the control plane alone: jobs that it has given up take none, while
    /// here they may still have something to bring.
    fn accept(&mut self, offer: v1::Offer) -> Result<Answer, String> {
        let lease =
            Lease::from_wire(&offer.lease.unwrap_or_default()).map_err(|e| e.to_string())?;
        if self.jobs.contains_key(&lease) {
            return Ok(Answer::Accept);
        }
        match self.intake.judge(lease.phase) {
            intake::Answer::Takes => {}
            intake::Answer::Closed => {
                tracing::info!(?lease, "handed an offer back: this runner takes no more jobs");
                return Ok(Answer::HandBack);
            }
            intake::Answer::OtherPhase => {
                tracing::warn!(?lease, "hands an offer back: this runner does not take the phase");
                return Ok(Answer::HandBackAfter(self.rest.after_a_failure()));
            }
        }
        let room = *self.room.borrow();
        if room != Room::Enough {
            tracing::warn!(?lease, ?room, "hands an offer back: the spool is full");
            return Ok(Answer::HandBackAfter(self.rest.after_a_failure()));
        }
        let job = offer.job.unwrap_or_default();
        let spec = Spec::from_wire(lease.phase, job).map_err(|error| error.to_string())?;
        let engine = self.engines.choose(spec.engine, &spec.terraform_version)?;
        let settings = Settings {
            engine: engine.name,
            terraform: engine.path,
            terraform_version: engine.version,
            ..self.settings.clone()
        };
        let created = JobDirectory::create(&self.jobs_path, &lease, &spec, &settings);
        let directory = match created {
            Ok(directory) => directory,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::error!(error, "failed to make a job directory");
                return Ok(Answer::HandBackAfter(self.rest.after_a_failure()));
            }
        };
        tracing::info!(?lease, "accepted");
        latchkey_failpoint::reach("run.accepted");
        self.take_up(directory, lease, spec, Origin::Offered);
        Ok(Answer::Accept)
    }

    fn tell(&self, lease: Option<v1::LeaseRef>, told: Told) {
        let held = Lease::from_wire(&lease.unwrap_or_default())
            .ok()
            .and_then(|lease| self.jobs.get(&lease));
        // One that is not there is of an older epoch, or already gone.
        if let Some(held) = held {
            held.told.send(told);
        }
    }
}

fn leases(of: &[v1::LeaseRef]) -> Vec<Lease> {
    of.iter().filter_map(|lease| Lease::from_wire(lease).ok()).collect()
}

/// Answers the jobs that this runner names as held: as many as a control plane takes, and those
/// first that are not known to be lost. Lost ones take no slot, so there may be any number.
fn named(jobs: &HashMap<Lease, Held>) -> Vec<Lease> {
    let mut jobs: Vec<_> = jobs.iter().collect();
    jobs.sort_by_key(|(_, held)| held.is_lost);
    jobs.into_iter().map(|(lease, _)| lease.clone()).take(MOST_NAMED).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::mailbox::mailbox;
    use super::*;

    #[test]
    fn lost_jobs_do_not_crowd_out_those_that_are_held() {
        let job = |epoch| {
            let lease = Lease { run_id: "r".into(), phase: Phase::Plan, epoch, generation: 1 };
            let (told, _) = mailbox();
            let directory = JobDirectory::open(Path::new("/nonexistent"));
            (lease, Held { directory, told, is_lost: epoch > 200 })
        };
        let jobs: HashMap<Lease, Held> = (1..=400).map(job).collect();
        let named = named(&jobs);
        assert_eq!(named.len(), MOST_NAMED);
        assert_eq!(named.iter().filter(|lease| lease.epoch <= 200).count(), 200);
    }
}
