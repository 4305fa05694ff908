//! `Debug` by hand for the messages that carry a secret: generated ones print every field.

use std::fmt;

use crate::v1;

/// Stands where a secret would.
struct Hidden;

impl fmt::Debug for Hidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[hidden]")
    }
}

macro_rules! redacted {
    ($($message:ident { $($shown:ident),* ; $($hidden:ident),* })*) => {$(
        impl fmt::Debug for v1::$message {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($message))
                    $(.field(stringify!($shown), &self.$shown))*
                    $(.field(stringify!($hidden), &Hidden))*
                    .finish()
            }
        }
    )*};
}

redacted! {
    AuthenticateRequest { run_id, phase, plan_digest, request_id; token_code }
    BootstrapRequest { organization, user; secret }
    BootstrapResponse { ; token }
    CreateEnvironmentRequest { organization, environment, settings, request_id; token_code }
    CreatePoolTokenResponse { expire_time; token }
    CreateServiceTokenResponse { expire_time; token }
    CheckEnvironmentRequest { organization, environment, request_id; token_code }
    CreateUserResponse { ; token }
    CreateWebhookRequest { organization, events, environments, request_id; url }
    CreateWebhookResponse { webhook; secret }
    DeleteVariableRequest { scope, name, category, request_id; token_code }
    EnrollRequest { name; pool_token, certificate_request }
    FetchArtifactResponse { ; data }
    ImportStateRequest { ; part }
    JobVariable { name, environment, hcl, sensitive; value }
    ReadQuarantinedResponse { ; data }
    ReadStateVersionResponse { ; data }
    ResetUserResponse { ; token }
    RunVariable { name, category, hcl, sensitive; value }
    SessionCredentials { access_key_id, expire_time; secret_access_key, session_token }
    SetPasswordRequest { ; current_password, new_password }
    SignInRequest { client; user, password }
    SignInResponse { session; token }
    TopUpRequest { run_id, request_id; token_code }
    SetVariableRequest { scope, name, category, sensitive, hcl, request_id; value, token_code }
    UpdateEnvironmentRequest {
        organization, environment, mfa_policy, auto_apply, working_directory, pool,
        session_duration, plain_credentials, region, runner_labels, engine, engine_version,
        second_person, plan_rule, code_credentials, roles, session_floor, limits, request_id;
        token_code
    }
    UpdateOrganizationRequest { organization, aws_accounts, request_id; token_code }
    UploadArtifactRequest { ; part }
    UploadConfigurationRequest { ; part }
    Variable { name, category, sensitive, hcl, update_time; value }
    Webhook { webhook_id, events, environments, created_by, create_time; url }
}

#[cfg(test)]
mod tests {
    use crate::v1;

    #[test]
    fn no_secret_reaches_debug() {
        let go = v1::Go {
            history: None,
            lease: None,
            credentials: Some(v1::SessionCredentials {
                access_key_id: "ASIAEXAMPLE".into(),
                secret_access_key: "canary-1".into(),
                session_token: "canary-2".into(),
                expire_time: None,
            }),
            variables: vec![v1::JobVariable {
                name: "password".into(),
                value: "canary-3".into(),
                ..Default::default()
            }],
        };
        let code = v1::AuthenticateRequest { token_code: "canary-4".into(), ..Default::default() };
        let top_up = v1::TopUpRequest { token_code: "canary-5".into(), ..Default::default() };
        let check =
            v1::CheckEnvironmentRequest { token_code: "canary-6".into(), ..Default::default() };
        let update =
            v1::UpdateEnvironmentRequest { token_code: "canary-7".into(), ..Default::default() };
        let sign_in = v1::SignInRequest { password: "canary-8".into(), ..Default::default() };
        let set = v1::SetPasswordRequest {
            current_password: "canary-9".into(),
            new_password: "canary-10".into(),
        };
        let url = "https://hooks.example.com/canary-11".to_owned();
        let webhook = v1::Webhook { url: url.clone(), ..Default::default() };
        let hook = v1::CreateWebhookRequest { url, ..Default::default() };
        let hooks = v1::ListWebhooksResponse { webhooks: vec![webhook.clone()] };
        let made = v1::CreateWebhookResponse { webhook: Some(webhook), secret: "canary-12".into() };
        let shown = format!(
            "{go:?} {code:?} {top_up:?} {check:?} {update:?} {sign_in:?} {set:?} {hook:?} \
             {hooks:?} {made:?}"
        );
        assert!(!shown.contains("canary"), "{shown}");
        assert!(shown.contains("password") && shown.contains("ASIAEXAMPLE"));
    }
}
