# A bucket for federations, and for every edge a user who reads what it needs and writes what is its own.
terraform {
  required_version = ">= 1.5"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 5.0"
    }
  }
}

resource "aws_s3_bucket" "federations" {
  bucket = var.bucket
}

resource "aws_s3_bucket_public_access_block" "federations" {
  bucket                  = aws_s3_bucket.federations.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_server_side_encryption_configuration" "federations" {
  bucket = aws_s3_bucket.federations.id
  rule {
    apply_server_side_encryption_by_default {
      sse_algorithm = "aws:kms"
    }
  }
}

resource "aws_s3_bucket_lifecycle_configuration" "federations" {
  bucket = aws_s3_bucket.federations.id
  rule {
    id     = "unfinished-uploads"
    status = "Enabled"
    filter {}
    abort_incomplete_multipart_upload {
      days_after_initiation = 1
    }
  }
}

locals {
  root = "${aws_s3_bucket.federations.arn}/${var.prefix}"
  # Whole names, not beginnings: edge "a" must not write for edge "a.b".
  own = {
    for edge in var.edges : edge => [
      "${local.root}/*/profiles/${edge}.json",
      "${local.root}/*/profiles/${edge}.link",
      "${local.root}/*/rounds/*/updates/${edge}.json",
      "${local.root}/*/rounds/*/updates/${edge}.safetensors",
      "${local.root}/*/rounds/*/failures/${edge}.json",
      "${local.root}/*/rounds/*/evaluations/${edge}.json",
      "${local.root}/*/rounds/*/evaluation_failures/${edge}.json",
      "${local.root}/*/leases/edges/${edge}.json",
    ]
  }
  shared = [
    "${local.root}/*/federation.json",
    "${local.root}/*/plan.json",
    "${local.root}/*/plans/*.json",
    "${local.root}/*/rounds/*/global.json",
    "${local.root}/*/rounds/*/global.safetensors",
    "${local.root}/*/rounds/*/judged.json",
    "${local.root}/*/leases/coordinator.json",
  ]
}

data "aws_iam_policy_document" "edge" {
  for_each = local.own

  statement {
    sid       = "ReadWhatTheCoordinatorSays"
    actions   = ["s3:GetObject"]
    resources = concat(local.shared, each.value)
  }

  statement {
    sid       = "WriteItsOwn"
    actions   = ["s3:PutObject", "s3:AbortMultipartUpload"]
    resources = each.value
  }

  statement {
    sid       = "RemoveTheLinkProbe"
    actions   = ["s3:DeleteObject"]
    resources = ["${local.root}/*/profiles/${each.key}.link"]
  }

  statement {
    sid       = "TellMissingFromForbidden"
    actions   = ["s3:ListBucket"]
    resources = [aws_s3_bucket.federations.arn]
    condition {
      test     = "StringLike"
      variable = "s3:prefix"
      values   = ["${var.prefix}/*"]
    }
  }
}

resource "aws_iam_user" "edge" {
  for_each = local.own
  name     = "fedpipe-${each.key}"
}

resource "aws_iam_user_policy" "edge" {
  for_each = local.own
  name     = "fedpipe-edge"
  user     = aws_iam_user.edge[each.key].name
  policy   = data.aws_iam_policy_document.edge[each.key].json
}
