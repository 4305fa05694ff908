//! Step 4 of the doctor: the roles that the modes use, assumed as a run would.

use std::time::Duration;

use latchkey_domain::policy::Phase;

use super::{Asked, Findings};
use crate::app::App;
use crate::app::credentials::{PACKED_WARNING, Purpose};
use crate::error::Result;
use crate::store::record::environment::{CodeCredentials, PlainCredentials};
use crate::sts::errors::{About, in_words, sentence};
use crate::sts::{
    Class, Credentials, Exchange, Refused, Triple, Wanted, account_of, account_of_role,
};

/// What a role assumed with a session may live.
const CHAINED: Duration = Duration::from_secs(3600);

/// How a phase's role is used, and tried.
struct Trial<'a> {
    phase: Phase,
    /// Long-term keys.
    keys: &'a Credentials,
    /// That of the code, if one was given and accepted.
    session: Option<&'a Credentials>,
    /// A run assumes it with a code.
    by_code: bool,
    /// A run assumes it without one.
    plain: bool,
    wanted: Wanted,
}

enum Tried {
    Issued { packed_percent: Option<u32> },
    Refused(Refused),
    Silent,
}

impl App {
    pub(super) async fn examine_roles(
        &self,
        asked: &Asked,
        triple: Option<&Triple>,
        plain_keys: Option<&Credentials>,
        session: Option<Credentials>,
        findings: &mut Findings,
    ) -> Result<()> {
        let settings = &asked.environment.settings;
        let by_code = settings.code_credentials == CodeCredentials::Role;
        let plain = settings.plain_credentials == PlainCredentials::Role;
        let triple_keys = triple.map(Triple::keys);
        for phase in Phase::ALL {
            let name = format!("{phase}_role");
            // A phase that always demands a code never gets the plain one.
            let plain = plain && !settings.policy.requires_code(phase);
            if !by_code && !plain {
                let message = format!("no role is assumed for the {phase}");
                findings.skipped(&name, message);
                continue;
            }
            let keys = if by_code { triple_keys.as_ref() } else { plain_keys };
            let Some(keys) = keys else {
                findings.skipped(&name, "there are no keys that could assume it");
                continue;
            };
            let session_name = format!("check-{}", asked.environment.id);
            let purpose = Purpose {
                environment: &asked.environment,
                phase,
                run: None,
                session_name: &session_name,
                source: &asked.name,
            };
            let wanted = match self.role_wanted(purpose).await {
                Ok(wanted) => wanted,
                Err(error) if super::is_finding(error.reason()) => {
                    findings.failed(&name, error.message(), "");
                    continue;
                }
                Err(error) => return Err(error),
            };
            let session = session.as_ref();
            let trial = Trial { phase, keys, session, by_code, plain, wanted };
            self.try_role(&trial, findings).await;
        }
        Ok(())
    }

    async fn try_role(&self, trial: &Trial<'_>, findings: &mut Findings) {
        let name = format!("{}_role", trial.phase);
        let arn = trial.wanted.role.as_ref().map_or("", |role| role.arn.as_str());
        let asked = in_words(trial.wanted.duration);
        let mut duration_fits = true;
        let mut tried = self.tried(trial.keys, &trial.wanted).await;
        if let Tried::Refused(Refused { class: Class::RoleMaximum, .. }) = &tried {
            duration_fits = false;
            tried = self.tried(trial.keys, &shortest(&trial.wanted)).await;
        }
        let duration_name = format!("{name}_duration");
        if !duration_fits {
            let message = format!("{arn} does not allow sessions of {asked}");
            let remedy = "raise the role's MaxSessionDuration, or shorten the environment's session \
                          duration with `latchkey env set --session-duration`";
            findings.failed(&duration_name, message, remedy);
        }
        let signer = match (tried, trial.session) {
            (Tried::Issued { packed_percent }, _) => {
                if duration_fits {
                    findings.ok(&duration_name, format!("{arn} allows sessions of {asked}"));
                }
                self.assumed(trial, arn, packed_percent, Needs::NoCode, findings);
                trial.keys
            }
            (Tried::Refused(refused), Some(session)) if refused.class == Class::RoleRefused => {
                match self.tried(session, &within_an_hour(&trial.wanted)).await {
                    Tried::Issued { packed_percent } => {
                        if duration_fits {
                            let message = "the role demands MFA, so how long it may live shows only \
                                           when a run assumes it";
                            findings.skipped(&duration_name, message);
                        }
                        self.assumed(trial, arn, packed_percent, Needs::Code, findings);
                        session
                    }
                    Tried::Refused(refused) => {
                        return refused_role(trial, &name, &refused, findings);
                    }
                    Tried::Silent => return findings.failed(&name, SILENT, "try again"),
                }
            }
            (Tried::Refused(refused), None)
                if refused.class == Class::RoleRefused && !trial.plain =>
            {
                let message = format!(
                    "{arn} cannot be assumed without a code, which is right if its trust demands \
                     MFA; give a code to see whether it can with one"
                );
                return findings.skipped(&name, message);
            }
            (Tried::Refused(refused), _) => {
                return refused_role(trial, &name, &refused, findings);
            }
            (Tried::Silent, _) => return findings.failed(&name, SILENT, "try again"),
        };
        self.try_external_id(trial, &name, arn, signer, findings).await;
    }

    fn assumed(
        &self,
        trial: &Trial<'_>,
        arn: &str,
        packed_percent: Option<u32>,
        needs: Needs,
        findings: &mut Findings,
    ) {
        let name = format!("{}_role", trial.phase);
        match needs {
            Needs::Code if trial.plain => {
                let message = format!(
                    "{arn} is assumed with a code only, and this {} demands none",
                    trial.phase
                );
                let remedy = "let the role's trust policy admit the user without \
                              aws:MultiFactorAuthPresent, or choose another role or mode";
                findings.failed(&name, message, remedy);
            }
            Needs::Code => findings.ok(&name, format!("{arn} is assumed with a code")),
            Needs::NoCode if trial.by_code => {
                let message = format!("{arn} is assumed, and without a code too");
                let remedy = "to let AWS itself demand the code, add the condition \
                              aws:MultiFactorAuthPresent to the role's trust policy";
                findings.add(&name, super::CheckOutcome::Ok, message, remedy);
            }
            Needs::NoCode => findings.ok(&name, format!("{arn} is assumed")),
        }
        let name = format!("{name}_packed_size");
        match packed_percent {
            Some(percent) if percent > PACKED_WARNING => {
                let message =
                    format!("session policies and tags take {percent} % of the space that AWS has");
                let remedy = "shorten the session policy, or put it into the role";
                findings.failed(&name, message, remedy);
            }
            Some(percent) => {
                let message =
                    format!("session policies and tags take {percent} % of the space that AWS has");
                findings.ok(&name, message);
            }
            None => findings.skipped(&name, "AWS does not say how much space they take"),
        }
    }

    /// Tries without the external id: a role of another account should not let that pass.
    async fn try_external_id(
        &self,
        trial: &Trial<'_>,
        name: &str,
        arn: &str,
        signer: &Credentials,
        findings: &mut Findings,
    ) {
        let name = format!("{name}_external_id");
        let mut without = within_an_hour(&trial.wanted);
        let external_id = without.role.as_mut().and_then(|role| role.external_id.take());
        let external_id = external_id.unwrap_or_default();
        let same_account = account_of(&trial.keys.access_key_id).as_deref() == account_of_role(arn);
        match self.tried(signer, &without).await {
            Tried::Issued { .. } if same_account => {
                let message = "the role demands no external id, which is well within one account";
                findings.ok(&name, message);
            }
            Tried::Issued { .. } => {
                let message = format!(
                    "{arn} is in another account and can be assumed without the external id"
                );
                let remedy = format!(
                    "add the condition StringEquals sts:ExternalId {external_id} to its trust policy"
                );
                findings.failed(&name, message, &remedy);
            }
            Tried::Refused(refused) if refused.class == Class::RoleRefused => {
                findings.ok(&name, format!("the role demands the external id {external_id}"));
            }
            Tried::Refused(_) | Tried::Silent => {
                findings.skipped(&name, "AWS did not say whether the role demands one");
            }
        }
    }

    async fn tried(&self, signer: &Credentials, wanted: &Wanted) -> Tried {
        match self.sts.exchange(signer, None, wanted).await {
            Exchange::Issued { packed_percent, .. } => Tried::Issued { packed_percent },
            Exchange::Refused(refused) => Tried::Refused(refused),
            Exchange::Unknown { .. } | Exchange::NotReached => Tried::Silent,
        }
    }
}

const SILENT: &str = "AWS STS did not answer";

/// What a role demands.
#[derive(Clone, Copy)]
enum Needs {
    Code,
    NoCode,
}

fn refused_role(trial: &Trial<'_>, name: &str, refused: &Refused, findings: &mut Findings) {
    let about = About { wanted: &trial.wanted, next_window: None };
    findings.failed(name, sentence(refused, about).1, "");
}

fn shortest(wanted: &Wanted) -> Wanted {
    Wanted { duration: super::SHORTEST, ..wanted.clone() }
}

fn within_an_hour(wanted: &Wanted) -> Wanted {
    Wanted { duration: wanted.duration.min(CHAINED), ..wanted.clone() }
}
