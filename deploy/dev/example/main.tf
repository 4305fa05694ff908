# Twenty resources without a provider, a network or a cost: what `cargo demo` plans and applies.

terraform {
  required_version = ">= 1.4"
}

variable "release" {
  description = "What is rolled out."
  type        = string
}

locals {
  zones    = ["a", "b", "c"]
  services = ["api", "cron", "web", "worker"]
  placements = {
    for pair in setproduct(local.services, local.zones) : "${pair[0]}-${pair[1]}" => pair
  }
}

resource "terraform_data" "network" {
  input = "10.0.0.0/16"
}

resource "terraform_data" "subnet" {
  count = length(local.zones)
  input = cidrsubnet(terraform_data.network.output, 8, count.index)
}

resource "terraform_data" "database" {
  input = { zones = local.zones, subnets = terraform_data.subnet[*].output }

  provisioner "local-exec" {
    command = "echo the database warms up; sleep 1; echo the database is warm"
  }
}

resource "terraform_data" "service" {
  for_each         = local.placements
  input            = { service = each.value[0], zone = each.value[1] }
  triggers_replace = var.release
}

resource "terraform_data" "address" {
  input      = "https://web.example.com/?release=${var.release}"
  depends_on = [terraform_data.service]
}

resource "terraform_data" "entry" {
  input = terraform_data.address.output
}

# Which way of getting AWS credentials terraform's process has. Names only, never a value.
resource "terraform_data" "identity" {
  provisioner "local-exec" {
    command = <<-EOT
      for name in AWS_CONTAINER_CREDENTIALS_FULL_URI AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE \
                  AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_PROFILE; do
        if printenv "$name" > /dev/null; then
          echo "$name is set"
        else
          echo "$name is not set"
        fi
      done
    EOT
  }
}
