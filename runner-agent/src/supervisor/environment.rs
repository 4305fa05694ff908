//! The environment of terraform's process: an allow-list, not the host's.
//!
//! Later sources win: what every job gets, what the runner's configuration passes on, what
//! users define, and last what Latchkey decides. Reserved names of users are refused by the
//! control plane when they are saved; dropping them here again is defence in depth, since one
//! `AWS_PROFILE` would beat the MFA session.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;

use secrecy::{ExposeSecret, SecretString};

use latchkey_proto::reserved::is_reserved;

use crate::job::{Lease, Spec};

/// What the runner's operator may pass on although users may not set it.
const FOR_OPERATORS: &[&str] =
    &["PATH", "AWS_CA_BUNDLE", "TF_LOG", "TF_LOG_CORE", "TF_LOG_PROVIDER"];

/// Tells whether the runner's configuration may pass this variable on.
pub(crate) fn may_be_passed(name: &str) -> bool {
    !is_reserved(name) || FOR_OPERATORS.contains(&name) || name.starts_with("AWS_ENDPOINT_URL")
}

/// A user's environment variable.
#[derive(Debug)]
pub(super) struct UserVariable {
    pub(super) name: String,
    pub(super) value: SecretString,
}

/// All that the environment is made from.
#[derive(Debug)]
pub(super) struct Sources<'a> {
    pub(super) lease: &'a Lease,
    pub(super) spec: &'a Spec,
    pub(super) home: &'a Path,
    pub(super) tmpdir: &'a Path,
    pub(super) cli_config: &'a Path,
    pub(super) passed: Vec<(String, OsString)>,
    pub(super) user: &'a [UserVariable],
    pub(super) state: Option<StateAccess<'a>>,
    pub(super) credentials: Option<CredentialsAccess<'a>>,
}

#[derive(Debug)]
pub(super) struct StateAccess<'a> {
    pub(super) address: String,
    pub(super) password: &'a SecretString,
}

#[derive(Debug)]
pub(super) struct CredentialsAccess<'a> {
    pub(super) uri: String,
    pub(super) token_file: &'a Path,
}

/// Makes the whole environment.
pub(super) fn build(sources: Sources<'_>) -> BTreeMap<String, OsString> {
    let mut all = BTreeMap::new();
    let mut set = |name: &str, value: OsString| {
        all.insert(name.to_owned(), value);
    };
    set("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into());
    set("LANG", "C.UTF-8".into());
    if !sources.spec.region.is_empty() {
        set("AWS_REGION", sources.spec.region.as_str().into());
        set("AWS_DEFAULT_REGION", sources.spec.region.as_str().into());
    }
    for (name, value) in sources.passed {
        if may_be_passed(&name) {
            set(&name, value);
        }
    }
    for variable in sources.user {
        if is_reserved(&variable.name) {
            tracing::warn!(name = %variable.name, "dropped a reserved variable");
        } else {
            // The one stated exception to "no secret in the environment".
            set(&variable.name, variable.value.expose_secret().into());
        }
    }

    set("HOME", sources.home.into());
    set("TMPDIR", sources.tmpdir.into());
    set("TF_INPUT", "0".into());
    set("TF_IN_AUTOMATION", "1".into());
    set("CHECKPOINT_DISABLE", "1".into());
    set("TF_CLI_CONFIG_FILE", sources.cli_config.into());
    // The host's files would win over the session of the job (measured).
    set("AWS_CONFIG_FILE", "/dev/null".into());
    set("AWS_SHARED_CREDENTIALS_FILE", "/dev/null".into());
    set("AWS_EC2_METADATA_DISABLED", "true".into());
    if let Some(state) = sources.state {
        for name in ["TF_HTTP_ADDRESS", "TF_HTTP_LOCK_ADDRESS", "TF_HTTP_UNLOCK_ADDRESS"] {
            set(name, state.address.as_str().into());
        }
        set("TF_HTTP_USERNAME", super::state_endpoint::USER.into());
        set("TF_HTTP_PASSWORD", state.password.expose_secret().into());
    }
    if let Some(credentials) = sources.credentials {
        set("AWS_CONTAINER_CREDENTIALS_FULL_URI", credentials.uri.into());
        set("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", credentials.token_file.into());
    }
    let (lease, spec) = (sources.lease, sources.spec);
    set("LATCHKEY_RUN_ID", lease.run_id.as_str().into());
    set("LATCHKEY_PHASE", lease.phase.name().into());
    set("LATCHKEY_RUN_KIND", spec.kind.name().into());
    set("LATCHKEY_ORGANIZATION", spec.organization.as_str().into());
    set("LATCHKEY_ENVIRONMENT", spec.environment.as_str().into());
    set("LATCHKEY_QUEUED_BY", spec.queued_by.as_str().into());
    set("LATCHKEY_RUN_MESSAGE", spec.message.replace('\0', "").into());
    set("TFC_RUN_ID", lease.run_id.as_str().into());
    set("TFC_WORKSPACE_NAME", spec.environment.as_str().into());
    set("TFC_WORKSPACE_SLUG", format!("{}/{}", spec.organization, spec.environment).into());
    set("TFC_CONFIGURATION_VERSION", spec.archive_digest.as_str().into());
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Phase;
    use crate::job_directory::tests as samples;

    #[test]
    fn operators_pass_more_but_never_credentials() {
        for (name, allowed) in [
            ("PATH", true),
            ("TF_LOG", true),
            ("AWS_ENDPOINT_URL_S3", true),
            ("SSH_AUTH_SOCK", true),
            ("AWS_PROFILE", false),
            ("AWS_ACCESS_KEY_ID", false),
            ("TF_HTTP_PASSWORD", false),
            ("HOME", false),
        ] {
            assert_eq!(may_be_passed(name), allowed, "{name}");
        }
    }

    #[test]
    fn later_sources_win_and_ours_is_last() {
        let (lease, spec) = (samples::lease("r1", Phase::Plan), samples::spec());
        let user = [("A", "user"), ("AWS_PROFILE", "user"), ("LATCHKEY_RUN_ID", "user")]
            .map(|(name, value)| UserVariable { name: name.into(), value: value.into() });
        let all = build(Sources {
            lease: &lease,
            spec: &spec,
            home: Path::new("/h"),
            tmpdir: Path::new("/t"),
            cli_config: Path::new("/c"),
            passed: vec![
                ("A".into(), "host".into()),
                ("B".into(), "host".into()),
                ("AWS_SESSION_TOKEN".into(), "host".into()),
            ],
            user: &user,
            state: None,
            credentials: None,
        });
        let value = |name: &str| all.get(name).and_then(|value| value.to_str());
        assert_eq!(value("A"), Some("user"));
        assert_eq!(value("B"), Some("host"));
        assert_eq!(value("AWS_PROFILE"), None);
        assert_eq!(value("AWS_SESSION_TOKEN"), None);
        assert_eq!(value("LATCHKEY_RUN_ID"), Some("r1"));
        assert_eq!(value("AWS_REGION"), Some("eu-central-1"));
        assert_eq!(value("TF_CLI_CONFIG_FILE"), Some("/c"));
        assert_eq!(value("AWS_CONTAINER_CREDENTIALS_FULL_URI"), None);
    }
}
