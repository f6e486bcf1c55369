"""What changes or checks the weights of a model: conversion, rotation, calibration, comparison."""
