//! `AssumeRole`: another's rights for a time, if the role's trust allows.
//!
//! The mark that MFA was shown counts where the trust demands it, whether it came with this very
//! call or with the session that signs it. It does not travel on: the new session has none.

use super::constraints::{Constraints, EXTERNAL_ID, NAME};
use super::{Answer, CallContext, issue, show_mfa};
use crate::credentials::{Caller, CallerKey, Principal};
use crate::encoding::{Form, element};
use crate::errors::Refusal;
use crate::state::State;
use crate::world::{Account, MfaCondition, Trust};

const DURATIONS: (i64, i64) = (900, 43_200);
const DEFAULT_DURATION: i64 = 3600;
const CHAIN_LIMIT: i64 = 3600;
/// How many characters of policies and tags fill the packed space. AWS packs in a way it does not
/// tell; this is what 1,690 characters at 157 % come to.
const PACKED_SPACE: usize = 1076;

pub(super) fn perform(state: &mut State, call: &CallContext<'_>) -> Answer {
    let form = call.form;
    let seconds = check(form)?;
    if form.value("Policy").is_some_and(|policy| !is_policy(policy)) {
        return Err(Refusal::MalformedPolicy);
    }
    let role_arn = form.value("RoleArn").unwrap_or("");
    let not_authorized =
        || Refusal::NotAuthorized { caller: call.caller.arn(), role: role_arn.to_owned() };
    let (account, role) = state.world.role(role_arn).ok_or_else(not_authorized)?;
    let (account, role) = (account.clone(), role.clone());

    if seconds > role.max_session_seconds {
        return Err(Refusal::RoleMaximum);
    }
    let marked = match call.caller.key {
        CallerKey::LongTerm => None,
        CallerKey::Session { .. } if seconds > CHAIN_LIMIT => return Err(Refusal::ChainLimit),
        CallerKey::Session { mfa } => mfa,
    };
    let source_identity = source_identity(call)?;
    let packed = packed_percent(form);
    if packed > 100 {
        return Err(Refusal::PackedPolicy { percent: packed });
    }
    let shown = show_mfa(state, call)?;
    let evidence = Evidence { mfa: shown.or(marked), external_id: form.value("ExternalId") };
    if !trusts(&account, &role.trust, call.caller, &evidence) {
        return Err(not_authorized());
    }

    let session_name = form.value("RoleSessionName").unwrap_or("").to_owned();
    let caller = Caller {
        account: account.id,
        partition: account.partition,
        principal: Principal::AssumedRole {
            role: role.name,
            session_name,
            source_identity: source_identity.clone(),
        },
        key: CallerKey::Session { mfa: None },
    };
    Ok(answer(state, call, caller, seconds, source_identity, packed))
}

/// What a caller brings beside its own name.
struct Evidence<'a> {
    mfa: Option<jiff::Timestamp>,
    external_id: Option<&'a str>,
}

fn trusts(account: &Account, trust: &Trust, caller: &Caller, evidence: &Evidence<'_>) -> bool {
    let principal = caller.principal_arn();
    let root = format!("arn:{}:iam::{}:root", caller.partition, caller.account);
    let named = if trust.principals.is_empty() {
        caller.account == account.id
    } else {
        trust.principals.iter().any(|trusted| {
            trusted == "*"
                || *trusted == principal
                || *trusted == caller.arn()
                || *trusted == root
                || *trusted == caller.account
        })
    };
    let mfa = match trust.mfa {
        MfaCondition::NotDemanded => true,
        MfaCondition::Demanded => evidence.mfa.is_some(),
    };
    let external_id = match &trust.external_id {
        Some(wanted) => evidence.external_id == Some(wanted),
        None => true,
    };
    named && mfa && external_id
}

fn check(form: &Form) -> Result<i64, Refusal> {
    let mut constraints = Constraints::default();
    constraints.required(form, "RoleArn");
    constraints.required(form, "RoleSessionName");
    constraints.text(form, "RoleArn", (20, 2048), None);
    constraints.text(form, "RoleSessionName", (2, 64), Some(&NAME));
    constraints.text(form, "ExternalId", (2, 1224), Some(&EXTERNAL_ID));
    constraints.text(form, "SourceIdentity", (2, 256), Some(&NAME));
    constraints.text(form, "Policy", (1, 2048), None);
    constraints.count("PolicyArns", policy_arns(form).len(), 10);
    constraints.count("Tags", form.pairs("Tags").len(), 50);
    constraints.mfa(form);
    let seconds = constraints.number(form, "DurationSeconds", DURATIONS, DEFAULT_DURATION);
    constraints.finish()?;
    Ok(seconds)
}

fn source_identity(call: &CallContext<'_>) -> Result<Option<String>, Refusal> {
    let asked = call.form.value("SourceIdentity");
    let set = match &call.caller.principal {
        Principal::User { .. } => None,
        Principal::AssumedRole { source_identity, .. } => source_identity.clone(),
    };
    match (set, asked) {
        (Some(set), Some(asked)) if set != asked => Err(Refusal::SourceIdentitySet),
        (Some(set), _) => Ok(Some(set)),
        (None, asked) => Ok(asked.map(str::to_owned)),
    }
}

fn is_policy(text: &str) -> bool {
    serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(text).is_ok()
}

fn policy_arns(form: &Form) -> Vec<&str> {
    (1..).map_while(|index| form.value(&format!("PolicyArns.member.{index}.arn"))).collect()
}

fn packed_percent(form: &Form) -> usize {
    let tags: usize = form.pairs("Tags").iter().map(|(key, value)| key.len() + value.len()).sum();
    let arns: usize = policy_arns(form).iter().map(|arn| arn.len()).sum();
    (form.value("Policy").map_or(0, str::len) + arns + tags) * 100 / PACKED_SPACE
}

fn answer(
    state: &mut State,
    call: &CallContext<'_>,
    caller: Caller,
    seconds: i64,
    source_identity: Option<String>,
    packed: usize,
) -> String {
    let user = format!(
        "<AssumedRoleUser>{}{}</AssumedRoleUser>",
        element("AssumedRoleId", &caller.unique_id()),
        element("Arn", &caller.arn()),
    );
    let mut result = issue(state, call, caller, seconds) + &user;
    if packed > 0 {
        result += &element("PackedPolicySize", &packed.to_string());
    }
    if let Some(identity) = source_identity {
        result += &element("SourceIdentity", &identity);
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_packed_share_is_that_of_a_published_case() {
        let form = Form::parse(&format!("Policy={}", "x".repeat(1690)));
        assert_eq!(packed_percent(&form), 157);
    }

    #[test]
    fn only_an_object_is_a_policy() {
        assert!(is_policy(r#"{"Version": "2012-10-17", "Statement": []}"#));
        assert!(!is_policy("[1]"));
        assert!(!is_policy("{"));
    }
}
