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
    CreatePoolTokenResponse { expire_time; token }
    CreateServiceTokenResponse { expire_time; token }
    CreateUserResponse { ; token }
    CreateWebhookResponse { webhook; secret }
    EnrollRequest { name; pool_token, certificate_request }
    FetchArtifactResponse { ; data }
    JobVariable { name, environment, hcl, sensitive; value }
    ReadQuarantinedResponse { ; data }
    ResetUserResponse { ; token }
    SessionCredentials { access_key_id, expire_time; secret_access_key, session_token }
    SetPasswordRequest { ; current_password, new_password }
    SignInRequest { client; user, password }
    SignInResponse { session; token }
    SetVariableRequest { scope, name, category, sensitive, hcl; value }
    UploadArtifactRequest { ; part }
    UploadConfigurationRequest { ; part }
    Variable { name, category, sensitive, hcl, update_time; value }
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
        let sign_in = v1::SignInRequest { password: "canary-5".into(), ..Default::default() };
        let set = v1::SetPasswordRequest {
            current_password: "canary-6".into(),
            new_password: "canary-7".into(),
        };
        let shown = format!("{go:?} {code:?} {sign_in:?} {set:?}");
        assert!(!shown.contains("canary"), "{shown}");
        assert!(shown.contains("password") && shown.contains("ASIAEXAMPLE"));
    }
}
