//! Compiles the `.proto` files without a `protoc`, and keeps the descriptor set for reflection
//! and for the tests that walk every rpc.

use std::path::PathBuf;
use std::{env, fs};

use prost::Message;

const FILES: &[&str] = &[
    "latchkey/v1/account.proto",
    "latchkey/v1/audit.proto",
    "latchkey/v1/environment.proto",
    "latchkey/v1/error.proto",
    "latchkey/v1/member.proto",
    "latchkey/v1/notice.proto",
    "latchkey/v1/organization.proto",
    "latchkey/v1/pool.proto",
    "latchkey/v1/quarantine.proto",
    "latchkey/v1/run.proto",
    "latchkey/v1/run_service.proto",
    "latchkey/v1/runner.proto",
    "latchkey/v1/session.proto",
    "latchkey/v1/state.proto",
    "latchkey/v1/variable.proto",
];

/// Messages that carry a secret: `src/redacted.rs` writes their `Debug` by hand.
const SECRET_MESSAGES: &[&str] = &[
    "AuthenticateRequest",
    "BootstrapRequest",
    "BootstrapResponse",
    "CreateEnvironmentRequest",
    "CreatePoolTokenResponse",
    "CreateServiceTokenResponse",
    "CheckEnvironmentRequest",
    "CreateUserResponse",
    "CreateWebhookRequest",
    "CreateWebhookResponse",
    "DeleteVariableRequest",
    "EnrollRequest",
    "FetchArtifactResponse",
    "ImportStateRequest",
    "JobVariable",
    "ReadQuarantinedResponse",
    "ResetUserResponse",
    "ReadStateVersionResponse",
    "RunVariable",
    "SessionCredentials",
    "SetPasswordRequest",
    "SetVariableRequest",
    "SignInRequest",
    "SignInResponse",
    "TopUpRequest",
    "UpdateEnvironmentRequest",
    "UpdateOrganizationRequest",
    "UploadArtifactRequest",
    "UploadConfigurationRequest",
    "Variable",
    "Webhook",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=latchkey");
    let files = protox::compile(FILES, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptor.bin"), files.encode_to_vec())?;

    let mut builder = tonic_prost_build::configure();
    for message in SECRET_MESSAGES {
        builder = builder.skip_debug([format!(".latchkey.v1.{message}")]);
    }
    builder.compile_fds(files)?;
    Ok(())
}
